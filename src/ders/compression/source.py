"""A trained MoE on disk, whatever its layout, as experts, routers and everything else."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ders.checkpoint import ModelFolderError, Piece, TensorFolder
from ders.upcycling import Family, Upcycling, require_family

Progress = Callable[[int, int], None]


def cast(piece: Piece, dtype: torch.dtype) -> Piece:
    """A piece in another type; as it is where it has that type already."""
    return piece if piece.dtype == dtype else Piece(dtype, piece.shape, lambda: piece.read().to(dtype))


@dataclass
class MoELayerSource:
    """One MoE layer in a file.

    Attributes:
        prefix: of its names: `model.layers.0.mlp`.
        experts: by projection, E matrices (O, I).
        biases: by projection that has one, E vectors (O,).
        base: by projection, the shared base that the experts were made from, where they were.
        others: router and universal FFN, by name inside the layer: `router.weight`, `universal.up_proj.weight`.
    """

    prefix: str
    experts: dict[str, list[Piece]]
    biases: dict[str, list[Piece]] = field(default_factory=dict)
    base: dict[str, Piece] = field(default_factory=dict)
    others: dict[str, Piece] = field(default_factory=dict)


@dataclass
class MoESource:
    """A trained MoE, seen as one with full experts.

    Attributes:
        folder: where it lies.
        config: the `config.json` of the dense model it came from.
        family: how that model builds its FFNs.
        upcycling: how its layers are built; `delta` is what the file holds, None for full experts.
        layers: by index.
        rest: all other tensors, under the names of the dense model.
        provenance: what the folder says of where it came from.
    """

    folder: Path
    config: dict[str, Any]
    family: Family
    upcycling: Upcycling
    layers: dict[int, MoELayerSource]
    rest: dict[str, Piece]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        first = next(iter(self.layers.values()))
        return next(iter(first.experts.values()))[0].dtype


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration."""
    found: dict[str, Any] = config.get("text_config") or config
    return found


def family_of(config: dict[str, Any], folder: Path) -> Family:
    model_type = text_config(config).get("model_type")
    try:
        return require_family(str(model_type))
    except ValueError as error:
        raise ModelFolderError(f"{folder / 'config.json'}: {error}") from error


def by_layer(names: Iterable[str], family: Family, inner: str) -> dict[int, tuple[str, dict[str, str]]]:
    """Names of MoE layers' tensors that match `inner` inside the layer: (prefix, {inner name: whole name}) by layer.

    A vision tower's FFNs can bear the very same names; only the decoder's MoE layers have a router.
    """
    pattern = re.compile(rf"(.*\b{family.layers}\.(\d+)\.{family.mlp})\.({inner})$")
    found: dict[tuple[str, int], dict[str, str]] = {}
    for name in sorted(names):
        if match := pattern.match(name):
            found.setdefault((match[1], int(match[2])), {})[match[3]] = name
    return {
        index: (prefix, names)
        for (prefix, index), names in found.items()
        if any(name.startswith("router.") for name in names)
    }


def dense_ffns(tensors: TensorFolder, source: MoESource) -> dict[int, dict[str, Piece]]:
    """The FFN matrices of a dense model's text decoder that a MoE's layers came from, by layer and projection.

    Raises:
        ModelFolderError: it lacks one, or one has another shape than the experts.
    """
    family, (index, layer) = source.family, next(iter(source.layers.items()))
    shapes = {name: stack[0].shape for name, stack in layer.experts.items()}
    weights = "|".join(rf"{name}\.weight" for name in family.ffn.projections)
    pattern = re.compile(rf"(.*\b{family.layers})\.(\d+)\.{family.mlp}\.({weights})$")
    by_prefix: dict[str, dict[tuple[int, str], Piece]] = {}
    for name, piece in tensors.pieces.items():
        if match := pattern.match(name):
            key = int(match[2]), match[3].removesuffix(".weight")
            by_prefix.setdefault(match[1], {})[key] = piece
    wanted = [(i, name) for i in source.layers for name in family.ffn.projections]
    fitting = {
        prefix: found
        for prefix, found in by_prefix.items()
        if all(key in found and found[key].shape == shapes[key[1]] for key in wanted)
    }
    # A vision tower can have like names and shapes: the MoE's own prefix decides, where the parent has it too.
    own = layer.prefix.removesuffix(f".{index}.{family.mlp}")
    found = fitting.get(own) or (next(iter(fitting.values())) if len(fitting) == 1 else None)
    if found is None:
        raise ModelFolderError(
            f"{tensors.folder}: not the dense model these experts came from: it has {len(fitting) or 'no'} FFNs with "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            + f" in layers {', '.join(map(str, source.layers))}"
        )
    return {i: {name: found[i, name] for name in family.ffn.projections} for i in source.layers}
