"""Adapters: routers, deltas and expert biases in a small folder, over a dense parent that is named by its hash.

What an adapter does not hold must be the parent's, bit for bit: saving checks every tensor of the model, loading checks
the parent's sha256. Loaded adapters take turns by `set_adapter` (`ders.upcycling.adapters`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ders.checkpoint import ModelFolderError, refuse_overlap
from ders.checkpoint.adapter import (
    CONFIG,
    FLOATS,
    WEIGHTS,
    AdapterConfig,
    ParentIdentity,
    parent_dtype,
    parent_sha256,
    read_adapter,
    write_adapter,
)
from ders.compression.compress import section_of
from ders.deltas import Delta
from ders.moe import MoELayer
from ders.upcycling import Upcycling, describe_delta, find_decoder
from ders.upcycling.adapter_layer import ALWAYS_HELD, UNIVERSAL, base_change_maker, pack, same_values, unpack_
from ders.upcycling.adapters import AttachedAdapter, adapters, attach, build_layers, dense_state, layer_name, parent_of

# What the first word of a tensor's name inside a layer says it is; all else is of the shared base.
KINDS = {"router": "routers", "experts": "deltas and biases", "universal": "universal FFNs"}


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapter folder holds. `str()` is the one line it reports.

    Attributes:
        num_bytes: of the folder's files.
        carried: bytes of tensors by kind.
    """

    config: AdapterConfig
    num_bytes: int
    carried: dict[str, int]

    def __str__(self) -> str:
        what = ", ".join(f"{kind} {count / 1e3:,.1f} kB" for kind, count in self.carried.items())
        how = self.config.base_change
        base = "as the parent's" if how is None else "exact" if how == "exact" else f"changed by {how}"
        return (
            f"adapter of {len(self.config.upcycling['layers'])} MoE layers, {self.num_bytes / 1e3:,.1f} kB ({what}; "
            f"shared base {base}) over {self.config.parent}"
        )


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    parent: nn.Module | str | Path,
    base_change: Callable[..., Delta] | None = None,
    overwrite: bool = False,
) -> AdapterSummary:
    """Write what makes an upcycled or compressed model differ from its dense parent; the model stays as it is.

    `load_adapter` then computes what this model computes, bit for bit, unless `base_change` approximates its base.
    Matrices of the shared base and of a universal FFN that are still the parent's cost nothing.

    Args:
        model: experts over a shared base, as `upcycle` with a delta or `compress` make them.
        folder: gets `adapter_config.json` and `adapter.safetensors`; it appears complete or not at all.
        parent: the dense model, in memory or as the path of its folder.
        base_change: where training changed the shared base, hold the change as this delta
            (`functools.partial(QuantizedDelta, bits=2)`), not the changed matrices themselves.
        overwrite: replace an older folder.

    Raises:
        ValueError: full experts, a parent that is not dense, or tensors that differ from the parent's and are no part
            of an adapter.
        ModelFolderError: the parent's folder is missing or damaged, or the adapter's exists already.
    """
    section = section_of(model)
    upcycling = _shared_base(section)
    where = str(parent.config._name_or_path if isinstance(parent, nn.Module) else parent)
    if Path(where).is_dir() and where:
        refuse_overlap(Path(folder), Path(where))
    dense = parent if isinstance(parent, nn.Module) else _load_parent(type(model), Path(parent))
    theirs = dense_state(dense)
    _refuse_other_changes(model, upcycling, theirs)
    how: str | dict[str, Any] = "exact" if base_change is None else describe_delta(base_change)
    tensors: dict[str, Tensor] = {}
    changed: list[str] = []
    for index in upcycling.layers:
        name, short = layer_name(model, index), _short_name(model, index)
        layer = model.get_submodule(name)
        assert isinstance(layer, MoELayer)
        make = base_change_maker(upcycling, how, index, next(layer.shared_parameters()).dtype)
        held, own = pack(layer, _inside(theirs, name), make)
        tensors |= {f"{short}.{key}": tensor for key, tensor in held.items()}
        changed += [f"{short}.{key}" for key in own]
    base_changed = any(f".{UNIVERSAL}" not in name for name in changed)
    config = AdapterConfig(section, _identity_of(dense, theirs), how if base_changed else None, changed)
    write_adapter(Path(folder), config, tensors, overwrite=overwrite)
    carried: dict[str, int] = {}
    for name, tensor in tensors.items():
        kind = KINDS.get(name.split(".")[3], "shared bases")
        carried[kind] = carried.get(kind, 0) + tensor.nbytes
    num_bytes = sum((Path(folder) / file).stat().st_size for file in (CONFIG, WEIGHTS))
    return AdapterSummary(config, num_bytes, carried)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path, *, name: str = "default") -> str:
    """Put an adapter over its dense parent in memory, make it active and return its name.

    The adapters of a model share its base tensors; one that changed some holds those itself. Training shared tensors
    would change the parent and every adapter over it: train with `trainable=adapter`.

    Raises:
        ModelFolderError: the folder is no adapter, or is damaged or incomplete.
        ValueError: the model is not the adapter's parent, or has an adapter of this name; it stays as it was.
    """
    if name in adapters(model):
        raise ValueError(f"this model has an adapter {name!r} already: choose another name, or remove_adapter it first")
    config, pieces = read_adapter(Path(folder))
    _verify_parent(dense_state(model), config.parent, Path(folder))
    try:
        upcycling = _shared_base(config.upcycling)
        layers = build_layers(model, upcycling)
    except (ValueError, TypeError) as error:
        raise ModelFolderError(f"{Path(folder) / CONFIG}: {error}") from error
    weights = Path(folder) / WEIGHTS
    unknown = set(pieces) | set(config.changed)
    for index, layer in layers.items():
        short = _short_name(model, index)
        held = _inside(pieces, short)
        changed = [key.removeprefix(f"{short}.") for key in config.changed if key.startswith(f"{short}.")]
        try:
            make = base_change_maker(upcycling, config.base_change, index, next(layer.shared_parameters()).dtype)
            unpack_(layer, held, changed, make)
        except KeyError as error:
            raise ModelFolderError(f"{weights}: lacks {short}.{error.args[0]}, which {CONFIG} describes") from error
        except (RuntimeError, ValueError) as error:
            raise ModelFolderError(f"{weights}: {short} is not what {CONFIG} describes: {error}") from error
        unknown = {key for key in unknown if not key.startswith(f"{short}.")} | {f"{short}.{key}" for key in held}
    if unknown:
        raise ModelFolderError(
            f"{weights}: holds {len(unknown)} tensors that {CONFIG} does not describe, among them "
            f"{', '.join(sorted(unknown)[:3])}"
        )
    attach(model, name, AttachedAdapter(layers, config.upcycling), config.parent)
    return name


def _shared_base(section: dict[str, Any]) -> Upcycling:
    if section.get("quant_method") != "ders":
        raise ValueError("this model was not upcycled: there is nothing that an adapter could hold")
    upcycling = Upcycling.from_section(section)
    if upcycling.delta is None:
        raise ValueError(
            "the experts of this model are full copies, which no adapter holds: compress it first (ders.compress), or "
            "save the whole model with save_pretrained"
        )
    return upcycling


def _load_parent(kind: type[Any], folder: Path) -> nn.Module:
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such folder. Give the dense parent's folder, or the model itself")
    try:
        # The class of the upcycled model, so that names agree; mapped, not copied; no code and no pickle from there.
        parent, report = kind.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # safetensors, json and torch each raise their own on a damaged file
        raise ModelFolderError(f"{folder}: cannot be loaded: {error}") from error
    if report["missing_keys"]:
        raise ModelFolderError(f"{folder}: lacks {', '.join(sorted(report['missing_keys'])[:3])}")
    dense: nn.Module = parent
    return dense


def _refuse_other_changes(model: nn.Module, upcycling: Upcycling, theirs: Mapping[str, Tensor]) -> None:
    """Everything but the replaced FFNs must be the parent's; of those, the parent must have the base."""
    replaced = tuple(f"{layer_name(model, index)}." for index in upcycling.layers)
    ours = {}
    for name, tensor in model.state_dict().items():
        inner = next((name.removeprefix(prefix) for prefix in replaced if name.startswith(prefix)), None)
        if inner is None:
            ours[name] = tensor
        elif not inner.startswith((*ALWAYS_HELD, UNIVERSAL)) and (
            name not in theirs or theirs[name].shape != tensor.shape
        ):
            raise ValueError(f"{name} is not in the parent, or has another shape there: it is another model")
    changed = [name for name, tensor in ours.items() if name not in theirs or not same_values(tensor, theirs[name])]
    changed += [name for name in theirs if name not in ours and not name.startswith(replaced)]
    if not changed:
        return
    wider = any(n in ours and torch.promote_types(ours[n].dtype, theirs[n].dtype) != ours[n].dtype for n in theirs)
    raise ValueError(
        f"{len(changed)} tensors differ from the parent's and are no part of an adapter, among them "
        f"{', '.join(changed[:3])}. "
        + ("The parent is in a wider type than the model: give it in the model's. " if wider else "")
        + "A model trained so (the paper's stage 3 also trains the dense FFNs and the projector) is a whole folder: "
        "save it with save_pretrained; or train with trainable=adapter"
    )


def _identity_of(parent: Any, state: Mapping[str, Tensor]) -> ParentIdentity:
    known = parent_of(parent)
    if known is not None:
        if parent_sha256(state.values(), FLOATS[known.dtype]) != known.sha256:
            raise ValueError(
                "the parent in memory was trained or cast since its adapters were loaded, so that an adapter over it "
                "could be loaded nowhere else: give the parent's folder, or save the whole model with save_pretrained"
            )
        return known
    dtype = parent_dtype(state.values())
    return ParentIdentity(
        id=str(parent.config._name_or_path or ""),
        revision=getattr(parent.config, "_commit_hash", None),
        sha256=parent_sha256(state.values(), dtype),
        dtype=next(name for name, known in FLOATS.items() if known == dtype),
    )


def _verify_parent(state: Mapping[str, Tensor], parent: ParentIdentity, folder: Path) -> None:
    dtype = FLOATS[parent.dtype]
    types = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    narrower = [str(found) for found in types if torch.promote_types(found, dtype) != found]
    if narrower:
        raise ValueError(
            f"{folder}: its parent is {parent}, and this model was loaded in {', '.join(sorted(narrower))}, which "
            f"cannot hold those values: load it with dtype=torch.{parent.dtype} or wider"
        )
    if parent_sha256(state.values(), dtype) != parent.sha256:
        raise ValueError(
            f"{folder}: this adapter belongs over {parent}. This model is another one, or it was trained or cast since "
            "it was loaded: load that parent afresh"
        )


def _short_name(model: nn.Module, index: int) -> str:
    """The name of an FFN from the decoder on, which does not depend on the class around the decoder."""
    _, _, family = find_decoder(model)
    return f"{family.layers}.{index}.{family.mlp}"


def _inside(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(f"{prefix}."): value for name, value in named.items() if name.startswith(f"{prefix}.")}
