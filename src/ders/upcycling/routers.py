"""Routers trained beforehand: one safetensors file with each layer's, as Med-MoE starts from."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ders.moe import Router, moe_layers

_KEY = re.compile(r"layers\.(\d+)\.(\w+)")


def save_routers(model: nn.Module, file: str | Path) -> None:
    """Write the router of every MoE layer, `layers.<index>.<parameter>`, for another model to start from.

    Raises:
        ValueError: the model has no MoE layers.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError("this model has no MoE layers, so no routers to save: upcycle it first")
    tensors = {}
    for name, layer in layers.items():
        index = re.findall(r"\d+", name)[-1]
        for parameter_name, parameter in layer.router.named_parameters():
            tensors[f"layers.{index}.{parameter_name}"] = parameter.detach().cpu().contiguous()
    save_file(tensors, str(file))


def read_routers(file: str | Path, layers: Sequence[int]) -> dict[int, dict[str, Tensor]]:
    """The routers of these decoder layers, by layer index and parameter name.

    Raises:
        ValueError: the file is missing or unreadable, lacks a layer, or holds others.
    """
    try:
        tensors = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"router_weights={file}: not a readable safetensors file: {error}") from error
    found: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"router_weights={file}: {key} is no router's: expected layers.<index>.<parameter>")
        found[int(match[1])][match[2]] = tensor
    if set(found) != set(layers):
        raise ValueError(
            f"router_weights={file} holds routers of layers {sorted(found)}, and {sorted(layers)} are upcycled: "
            "write it with save_routers from a model with the same layers"
        )
    return dict(found)


def load_router(router: Router, weights: dict[str, Tensor], index: int) -> None:
    """Give a router its trained weights.

    Raises:
        ValueError: they are of another shape or another kind of router.
    """
    expected = {name: tuple(p.shape) for name, p in router.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != given:
        raise ValueError(f"router of layer {index}: the file holds {given}, and {type(router).__name__} has {expected}")
    if not any(p.is_meta for p in router.parameters()):
        router.load_state_dict(weights)
