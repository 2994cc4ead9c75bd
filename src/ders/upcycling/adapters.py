"""Several adapters over one dense model in memory: MoE layers that take turns over the same base weights.

The layers that are not in use are kept beside the module tree, not in it: they are in no `state_dict`, no optimizer and
no saved folder.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ders.checkpoint.adapter import ParentIdentity
from ders.moe import MoELayer, moe_layers
from ders.upcycling.description import Upcycling
from ders.upcycling.families import Family, find_decoder
from ders.upcycling.surgery import apply

_ATTRIBUTE = "_ders_adapters"


@dataclass(frozen=True)
class AttachedAdapter:
    """One adapter in memory.

    Attributes:
        layers: its MoE layers by decoder layer.
        section: the `ders` section that the model's configuration bears while it is active.
    """

    layers: dict[int, MoELayer]
    section: dict[str, Any]


@dataclass
class AttachedAdapters:
    """All adapters of a model.

    Attributes:
        parent: what the dense model was when the adapters were loaded.
        dense: the parent's own FFNs, of every decoder layer that an adapter replaces.
    """

    parent: ParentIdentity | None = None
    dense: dict[int, nn.Module] = field(default_factory=dict)
    by_name: dict[str, AttachedAdapter] = field(default_factory=dict)


def adapters(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in the order they were loaded."""
    return list(_attached(model).by_name)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter active, or with None the dense parent, exactly as it was; nothing is copied.

    The layers put in take the device, the type and the training mode of those they replace, so that they follow what
    happened to the model (`model.to`, `model.eval`) while they were out. A cast to a narrower type stays one: the
    values that were cut off are in the adapter's file only.

    Raises:
        ValueError: there is no such adapter.
    """
    attached = _attached(model)
    if name is not None and name not in attached.by_name:
        known = ", ".join(attached.by_name) or "none: load one with load_adapter"
        raise ValueError(f"no adapter {name!r} over this model; it has {known}")
    chosen = AttachedAdapter({}, {}) if name is None else attached.by_name[name]
    _, decoder, family = find_decoder(model)
    blocks = getattr(decoder, family.layers)
    for index, dense in attached.dense.items():
        _put_in(blocks[index], family, chosen.layers.get(index, dense))
    config: Any = model.config
    if name is None:
        vars(config).pop("quantization_config", None)
    else:
        config.quantization_config = copy.deepcopy(chosen.section)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter; where it is active the dense parent takes its place.

    Raises:
        ValueError: there is no such adapter.
    """
    attached = _attached(model)
    if name not in attached.by_name:
        raise ValueError(f"no adapter {name!r} over this model; it has {', '.join(attached.by_name) or 'none'}")
    present = moe_layers(model).values()
    if any(layer in present for layer in attached.by_name[name].layers.values()):
        set_adapter(model, None)
    del attached.by_name[name]
    if not attached.by_name:
        delattr(model, _ATTRIBUTE)


def parent_of(model: nn.Module) -> ParentIdentity | None:
    """What the model under the adapters was when they were loaded; None where there are none."""
    return _attached(model).parent


def attach(model: nn.Module, name: str, adapter: AttachedAdapter, parent: ParentIdentity) -> None:
    """Add an adapter, of layers that `build_layers` made over this parent, and make it active."""
    _, decoder, family = find_decoder(model)
    attached = _attached(model)
    attached.parent = parent
    if not hasattr(model, _ATTRIBUTE):
        setattr(model, _ATTRIBUTE, attached)
        _own_config(model)
    for index in adapter.layers:
        attached.dense.setdefault(index, getattr(getattr(decoder, family.layers)[index], family.mlp))
    attached.by_name[name] = adapter
    set_adapter(model, name)


def build_layers(model: nn.Module, upcycling: Upcycling) -> dict[int, MoELayer]:
    """The MoE layers of an `Upcycling` over a dense model, sharing its base tensors; the model stays as it is."""
    _, decoder, family = find_decoder(model)
    blocks = getattr(decoder, family.layers)
    # The surgery is done on a decoder that has these FFNs and nothing else.
    stand_in = nn.Module()
    stand_in.config = decoder.config
    setattr(stand_in, family.layers, nn.ModuleList(nn.Module() for _ in blocks))
    holders = getattr(stand_in, family.layers)
    known = _attached(model).dense
    outside = [index for index in upcycling.layers if not 0 <= index < len(blocks)]
    if outside:
        raise ValueError(f"layers {outside} are not among the {len(blocks)} decoder layers of this model")
    for index in upcycling.layers:
        setattr(holders[index], family.mlp, known.get(index, getattr(blocks[index], family.mlp)))
    apply(stand_in, upcycling)
    return {index: getattr(holders[index], family.mlp) for index in upcycling.layers}


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` of the dense parent, whichever adapter is active.

    Raises:
        ValueError: the model is no dense parent: upcycled itself, or quantised.
    """
    attached = _attached(model)
    if not attached.by_name and (moe_layers(model) or getattr(model.config, "quantization_config", None) is not None):
        raise ValueError(
            "an adapter's parent is a dense model, and this one has MoE layers or is quantised: load the dense model"
        )
    state = dict(model.state_dict())
    for index, dense in attached.dense.items():
        prefix = f"{layer_name(model, index)}."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        state.update(dense.state_dict(prefix=prefix))
    return state


def layer_name(model: nn.Module, index: int) -> str:
    """The module name of a decoder layer's FFN."""
    decoder_name, _, family = find_decoder(model)
    return ".".join(filter(None, [decoder_name, family.layers, str(index), family.mlp]))


def _attached(model: nn.Module) -> AttachedAdapters:
    found: AttachedAdapters | None = getattr(model, _ATTRIBUTE, None)
    return AttachedAdapters() if found is None else found


def _put_in(block: nn.Module, family: Family, new: nn.Module) -> None:
    old = getattr(block, family.mlp)
    if new is old:
        return
    like = getattr(old, family.ffn.output).weight
    new.to(device=like.device, dtype=like.dtype).train(old.training)
    if isinstance(old, MoELayer):
        old.last_routing = None  # it holds the graph of its step
    setattr(block, family.mlp, new)


def _own_config(model: nn.Module) -> None:
    # A shallow copy: the configuration may be shared with models that stay dense.
    config = model.config
    own = copy.copy(config)
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = own
