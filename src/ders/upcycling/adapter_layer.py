"""One MoE layer as the part of it that its dense FFN does not hold, and back.

Names are those of the layer's `state_dict`; a base matrix that is held as a change is `base_change.<projection>.…`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ders.checkpoint import Piece
from ders.deltas import Delta
from ders.moe import MoELayer
from ders.upcycling.description import Upcycling
from ders.upcycling.surgery import delta_maker

# The rest of a layer (shared base, universal FFN) was the parent's, and is held only where it changed.
ALWAYS_HELD = ("router.", "experts.")
UNIVERSAL = "universal."
CHANGE = "base_change."

# Makes the delta of one base matrix: (projection, O, I) → Delta. None: changed matrices are held as they are.
ChangeMaker = Callable[[str, int, int], Delta] | None


def base_change_maker(
    upcycling: Upcycling, base_change: str | dict[str, Any] | None, index: int, dtype: torch.dtype
) -> ChangeMaker:
    """How the base of layer `index` holds its changes, from the description in `adapter_config.json`."""
    if not isinstance(base_change, dict):
        return None
    make = delta_maker(dataclasses.replace(upcycling, delta=base_change), index, dtype)
    # The name keeps its random choices apart from those of the experts' deltas.
    return lambda name, out_features, in_features: make(f"{CHANGE}{name}", 1, out_features, in_features)


def pack(layer: MoELayer, parent: Mapping[str, Tensor], make: ChangeMaker) -> tuple[dict[str, Tensor], list[str]]:
    """What the parent's FFN cannot give back, by name, and which of its weights this layer has its own of."""
    held: dict[str, Tensor] = {}
    changed = []
    for name, tensor in layer.state_dict().items():
        if name.startswith(ALWAYS_HELD):
            held[name] = tensor
            continue
        original = parent[name.removeprefix(UNIVERSAL)]
        if same_values(tensor, original):
            continue
        changed.append(name)
        if make is None or name.startswith(UNIVERSAL):
            held[name] = tensor
        else:
            projection = name.removesuffix(".weight")
            delta = make(projection, *tensor.shape).fit_((_wide(tensor) - _wide(original))[None])
            held.update({f"{CHANGE}{projection}.{key}": t for key, t in delta.state_dict().items()})
    return held, changed


def unpack_(layer: MoELayer, held: dict[str, Piece], changed: Iterable[str], make: ChangeMaker) -> None:
    """Give a layer that was built over the parent what `pack` kept; takes it out of `held`.

    Raises:
        KeyError: `held` lacks a tensor.
        RuntimeError: one has another shape.
    """
    state = layer.state_dict()
    own: dict[str, Tensor] = {}
    for name in [*(name for name in state if name.startswith(ALWAYS_HELD)), *changed]:
        if name.startswith((*ALWAYS_HELD, UNIVERSAL)) or make is None:
            own[name] = held.pop(name).read()
        else:
            projection = name.removesuffix(".weight")
            delta = make(projection, *state[name].shape)
            delta.load_state_dict({key: held.pop(f"{CHANGE}{projection}.{key}").read() for key in delta.state_dict()})
            own[name] = _wide(state[name]) + _wide(delta.dense(0))
        if not name.startswith((*ALWAYS_HELD, UNIVERSAL)):
            # A tensor of its own: this one is the parent's, and every other adapter's.
            linear = layer.get_submodule(name.removesuffix(".weight"))
            linear.weight = nn.Parameter(torch.empty_like(state[name]))
    layer.load_state_dict(own, strict=False)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, be it in types of different width."""
    if one.shape != other.shape:
        return False
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(device=one.device, dtype=dtype))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.promote_types(tensor.dtype, torch.float32))
