"""Our own folders as a source: full experts, or experts made from a shared base and deltas."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ders.checkpoint import ModelFolderError, Piece, TensorFolder
from ders.compression.source import MoELayerSource, MoESource, by_layer, family_of
from ders.deltas import Delta
from ders.upcycling import Family, Upcycling, delta_maker

_INNER = r"experts\..+|router\..+|universal\..+"


def is_own(tensors: TensorFolder) -> bool:
    return (tensors.config().get("quantization_config") or {}).get("quant_method") == "ders"


def read_own(tensors: TensorFolder) -> MoESource:
    """A folder with a `ders` section, full experts or shared base."""
    config = tensors.config()
    section = config.pop("quantization_config")
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    try:
        upcycling = Upcycling.from_section(section)
    except ValueError as error:
        raise ModelFolderError(f"{tensors.folder}: {error}") from error
    if not upcycling.layers:
        raise ModelFolderError(f"{tensors.folder}: config.json names no MoE layers: nothing to read")
    family = family_of(config, tensors.folder)
    inner = (
        _INNER if upcycling.delta is None else "|".join([_INNER, *(rf"{p}\.weight" for p in family.ffn.projections)])
    )
    found = {i: named for i, named in by_layer(list(tensors.pieces), family, inner).items() if i in upcycling.layers}
    if tuple(sorted(found)) != upcycling.layers:
        missing = sorted(set(upcycling.layers) - set(found))
        raise ModelFolderError(f"{tensors.folder}: incomplete: no experts of layers {missing}, which config.json names")
    layers = {index: _layer(tensors, family, upcycling, index, *found[index]) for index in upcycling.layers}
    taken = {name for _, names in found.values() for name in names.values()}
    rest = {name: piece for name, piece in tensors.pieces.items() if name not in taken}
    return MoESource(
        tensors.folder, config, family, upcycling, layers, rest, provenance=section.get("provenance") or {}
    )


def _layer(
    tensors: TensorFolder, family: Family, upcycling: Upcycling, index: int, prefix: str, names: dict[str, str]
) -> MoELayerSource:
    pieces = {inner: tensors.pieces[name] for inner, name in names.items()}
    layer = MoELayerSource(prefix, {})
    for name in family.ffn.projections:
        key = f"experts.weights_EOI.{name}" if upcycling.delta is None else f"{name}.weight"
        if key not in pieces:
            raise ModelFolderError(f"{tensors.folder}: incomplete: lacks {prefix}.{key}")
        if upcycling.delta is None:
            if pieces[key].shape[0] != upcycling.num_experts:
                raise ModelFolderError(
                    f"{tensors.folder}: config.json says num_experts={upcycling.num_experts}, and {prefix}.{key} holds "
                    f"{pieces[key].shape[0]}"
                )
            layer.experts[name] = [pieces[key][e] for e in range(upcycling.num_experts)]
        else:
            layer.base[name] = pieces[key]
            layer.experts[name] = _synthesised(upcycling, index, name, pieces, prefix, tensors)
        if (bias := f"experts.biases_EO.{name}") in pieces:
            layer.biases[name] = [pieces[bias][e] for e in range(pieces[bias].shape[0])]
    layer.others = {key: p for key, p in pieces.items() if key.startswith(("router.", "universal."))}
    return layer


def _synthesised(
    upcycling: Upcycling, index: int, name: str, pieces: dict[str, Piece], prefix: str, tensors: TensorFolder
) -> list[Piece]:
    """Experts W_base + Δ_e, added in fp32 and rounded to the base's type; built when read."""
    base = pieces[f"{name}.weight"]
    start = f"experts.deltas.{name}."
    stored = {key.removeprefix(start): piece for key, piece in pieces.items() if key.startswith(start)}
    count = upcycling.num_experts + upcycling.extended
    try:
        with torch.device("meta"):
            described = delta_maker(upcycling, index, base.dtype)(name, count, *base.shape).state_dict()
    except (ValueError, TypeError, KeyError) as error:
        raise ModelFolderError(f"{tensors.folder}: config.json describes a delta that cannot be: {error}") from error
    expected, found = {k: tuple(v.shape) for k, v in described.items()}, {k: p.shape for k, p in stored.items()}
    if expected != found:
        raise ModelFolderError(
            f"{tensors.folder}: the tensors of {prefix}.{start}* do not fit what config.json says: expected "
            f"{expected}, found {found}"
        )
    loaded: list[Delta] = []

    def expert(e: int) -> Callable[[], Tensor]:
        def read() -> Tensor:
            wide = torch.promote_types(base.dtype, torch.float32)
            if not loaded:
                delta = delta_maker(upcycling, index, base.dtype)(name, count, *base.shape)
                delta.load_state_dict({key: piece.read() for key, piece in stored.items()})
                loaded.append(delta.to(wide))
            weight_OI = loaded[0].dense(e).detach().to(wide)
            if e == count - 1:  # the last of this projection: let go of its deltas
                loaded.clear()
            return weight_OI.add_(base.read()).to(base.dtype)

        return read

    return [Piece(base.dtype, base.shape, expert(e)) for e in range(count)]


def as_vanilla(upcycling: Upcycling) -> Upcycling:
    """The same layers with full experts."""
    return dataclasses.replace(upcycling, delta=None, extended=False)
