"""Compression from disk to disk: a few tensors in memory, whatever the model's size."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ders.checkpoint import (
    FolderWriter,
    ModelFolderError,
    Piece,
    Slot,
    TensorFolder,
    copy_other_files,
    new_folder,
    refuse_overlap,
    write_config,
)
from ders.compression.compress import CompressionSummary, compressed_form, fit, mean_of, warn_of_mean
from ders.compression.reading import read_source
from ders.compression.source import MoELayerSource, MoESource, Progress, cast, dense_ffns
from ders.deltas import Delta
from ders.upcycling import Upcycling, delta_maker


def compress_folder(
    checkpoint: Path | str,
    output: Path | str,
    *,
    base: Path | str,
    delta: Callable[..., Delta],
    extended: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    provenance: dict[str, Any] | None = None,
) -> CompressionSummary:
    """Write the compressed form of a trained MoE's folder, tensor by tensor; `compress` is the same in memory.

    Args:
        checkpoint: a folder of full experts: ours, or any layout that `read_source` knows.
        output: the new folder; appears whole or not at all.
        base: folder of the dense model the MoE came from, or `"mean"`.
        delta, extended: as for `compress`.
        overwrite: replace an existing output, once the new one is whole.
        progress: called with (bytes read, bytes to read).
        provenance: added to what the folder says of where it came from.

    Raises:
        ModelFolderError: a folder is damaged, the base is not the one the MoE came from, or there is no room.
        ValueError: a dial does not fit, or the experts did not come from the base.
    """
    inputs = [Path(checkpoint), *([] if base == "mean" else [Path(base)])]
    refuse_overlap(Path(output), *inputs)
    source = read_source(Path(checkpoint))
    upcycling = compressed_form(source.upcycling, delta, extended)
    bases, base_sha256 = _bases(source, base)
    with new_folder(Path(output), overwrite=overwrite) as unfinished:
        copy_other_files(source.folder, unfinished)
        shapes = delta_shapes(source, upcycling)
        with FolderWriter(unfinished, compressed_slots(source, upcycling, shapes)) as writer:
            summary = _write(source, upcycling, bases, base, writer, progress or _silent)
            sha256 = writer.close()
        about = {
            **source.provenance,
            **(provenance or {}),
            "compressed_from": str(source.folder.resolve()),
            "base": base if base == "mean" else str(Path(base).resolve()),
            "content_sha256": sha256,
        }
        if base_sha256 is not None:
            about["parent_sha256"] = base_sha256
        write_config(unfinished, source.config | {"quantization_config": upcycling.to_section(about)})
    return summary


def _silent(done: int, total: int) -> None:
    pass


def _bases(source: MoESource, base: Path | str) -> tuple[dict[int, dict[str, Piece]], str | None]:
    """The base's matrices by layer and projection, and the sha256 of the model they are from."""
    dtype = source.dtype
    if base == "mean":
        warn_of_mean()
        return {
            index: {name: _mean_piece(stack[: source.upcycling.num_experts]) for name, stack in layer.experts.items()}
            for index, layer in source.layers.items()
        }, None
    tensors = TensorFolder(Path(base))
    found = dense_ffns(tensors, source)
    sha256, expected = tensors.content_sha256(), source.provenance.get("parent_sha256")
    if expected is not None and sha256 != expected:
        raise ModelFolderError(
            f"{base}: not the parent of {source.folder}: its weights have sha256 {sha256[:16]}…, and the model came "
            f"from {expected[:16]}… ({source.provenance.get('parent')}). Give that folder, or base=mean"
        )
    return {i: {name: cast(piece, dtype) for name, piece in pieces.items()} for i, pieces in found.items()}, sha256


def _mean_piece(stack: list[Piece]) -> Piece:
    first = stack[0]
    return Piece(first.dtype, first.shape, lambda: mean_of([piece.read() for piece in stack], first.dtype))


# By layer and projection: the stored tensors of its deltas, on the meta device.
DeltaShapes = dict[int, dict[str, dict[str, Tensor]]]


def delta_shapes(source: MoESource, upcycling: Upcycling) -> DeltaShapes:
    count, shapes = upcycling.num_experts + upcycling.extended, {}
    with torch.device("meta"):
        for index, layer in source.layers.items():
            make = delta_maker(upcycling, index, source.dtype)
            shapes[index] = {n: make(n, count, *stack[0].shape).state_dict() for n, stack in layer.experts.items()}
    return shapes


def compressed_slots(source: MoESource, upcycling: Upcycling, shapes: DeltaShapes) -> Iterable[Slot]:
    for name, piece in source.rest.items():
        yield Slot(name, piece.dtype, piece.shape)
    for index, layer in source.layers.items():
        for name, stack in layer.experts.items():
            yield Slot(f"{layer.prefix}.{name}.weight", stack[0].dtype, stack[0].shape)
            for key, tensor in shapes[index][name].items():
                yield Slot(f"{layer.prefix}.experts.deltas.{name}.{key}", tensor.dtype, tuple(tensor.shape))
        for name, biases in _biases(layer, upcycling).items():
            yield Slot(f"{layer.prefix}.experts.biases_EO.{name}", biases[0].dtype, (len(biases), *biases[0].shape))
        for name, piece in _others(layer, upcycling).items():
            yield Slot(f"{layer.prefix}.{name}", piece.dtype, piece.shape)


def _biases(layer: MoELayerSource, upcycling: Upcycling) -> dict[str, list[Piece]]:
    if not upcycling.extended:
        return layer.biases
    return {name: [*biases, layer.others[f"universal.{name}.bias"]] for name, biases in layer.biases.items()}


def _others(layer: MoELayerSource, upcycling: Upcycling) -> dict[str, Piece]:
    return {n: p for n, p in layer.others.items() if not (upcycling.extended and n.startswith("universal."))}


def _write(
    source: MoESource,
    upcycling: Upcycling,
    bases: dict[int, dict[str, Piece]],
    base: Path | str,
    writer: FolderWriter,
    progress: Progress,
) -> CompressionSummary:
    stacks = [
        (index, layer, name, [*stack, layer.others[f"universal.{name}.weight"]] if upcycling.extended else stack)
        for index, layer in source.layers.items()
        for name, stack in layer.experts.items()
    ]
    expert_bytes = sum(piece.num_bytes for *_, stack in stacks for piece in stack)
    total, done = sum(piece.num_bytes for piece in source.rest.values()) + expert_bytes, 0
    base_bytes = delta_bytes = 0
    largest = 0.0
    for name, piece in source.rest.items():
        writer.write(name, piece.read())
        progress(done := done + piece.num_bytes, total)
    for index, layer, name, stack in stacks:
        base_OI = bases[index][name].read()
        make = delta_maker(upcycling, index, source.dtype)
        compressed = make(name, len(stack), *base_OI.shape)
        where = f"{source.folder}: {layer.prefix}.{name}"

        def weights(stack: list[Piece] = stack) -> Iterator[Tensor]:
            nonlocal done
            for piece in stack:
                yield piece.read()
                progress(done := done + piece.num_bytes, total)

        largest = max(largest, fit(compressed, weights(), base_OI, where, base))
        writer.write(f"{layer.prefix}.{name}.weight", base_OI)
        base_bytes += base_OI.nbytes
        for key, tensor in compressed.state_dict().items():
            writer.write(f"{layer.prefix}.experts.deltas.{name}.{key}", tensor)
            delta_bytes += tensor.nbytes
    for layer in source.layers.values():
        for name, biases in _biases(layer, upcycling).items():
            for piece in biases:
                writer.write(f"{layer.prefix}.experts.biases_EO.{name}", piece.read())
                delta_bytes += piece.num_bytes
                expert_bytes += piece.num_bytes
        for name, piece in _others(layer, upcycling).items():
            writer.write(f"{layer.prefix}.{name}", piece.read())
    return CompressionSummary(upcycling, expert_bytes, base_bytes, delta_bytes, largest)
