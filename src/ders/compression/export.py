"""Export from disk to disk: a few tensors in memory, whatever the model's size."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from ders.checkpoint import (
    FolderWriter,
    ModelFolderError,
    Slot,
    copy_other_files,
    new_folder,
    refuse_overlap,
    write_config,
)
from ders.compression.layouts import LAYOUTS, Layout, Stored
from ders.compression.reading import read_source
from ders.compression.source import MoESource
from ders.compression.stock import cast

Progress = Callable[[int, int], None]


def export_folder(
    checkpoint: Path | str,
    output: Path | str,
    *,
    layout: str,
    overwrite: bool = False,
    progress: Progress | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Write a trained MoE with full experts in another layout, tensor by tensor; returns the bytes of its tensors.

    Experts over a shared base are synthesised: W_base + Δ_e, added in fp32 and rounded to the folder's type. Stock
    classes compute router logits in the model's type, so there the router is rounded to it too.

    Args:
        checkpoint: any folder that `read_source` knows.
        output: the new folder; appears whole or not at all.
        layout: `vanilla` (ours), `mixtral` or `qwen2_moe` (Hugging Face's: plain transformers loads them).
        overwrite: replace an existing output, once the new one is whole.
        progress: called with (bytes written, bytes to write).
        dtype: of the new folder's weights, our router's left out; the checkpoint's own where it is not given.

    Raises:
        ModelFolderError: the layout cannot express the model (before anything is written; it says why, and which
            layout can), the folder is damaged, or there is no room.
    """
    refuse_overlap(Path(output), Path(checkpoint))
    source = read_source(Path(checkpoint))
    planned = plan(source, layout, dtype)
    with new_folder(Path(output), overwrite=overwrite) as unfinished:
        return write_layout(source, planned, unfinished, progress)


def plan(source: MoESource, layout: str, dtype: torch.dtype | None = None) -> Layout:
    """What an export of this model will write.

    Raises:
        ModelFolderError: the layout is unknown, or cannot express the model.
    """
    if layout not in LAYOUTS:
        raise ModelFolderError(f"layout must be one of {', '.join(LAYOUTS)}: got {layout!r}")
    planned = LAYOUTS[layout](source)
    if dtype is None:
        return planned
    return dataclasses.replace(
        planned,
        config=planned.config | {"dtype": str(dtype).removeprefix("torch.")},
        tensors=[_as(stored, dtype) for stored in planned.tensors],
    )


def _as(stored: Stored, dtype: torch.dtype) -> Stored:
    slot = stored.slot
    if not slot.dtype.is_floating_point or ".router." in slot.name:
        return stored
    return Stored(Slot(slot.name, dtype, slot.shape), [cast(piece, dtype) for piece in stored.pieces])


def write_layout(source: MoESource, planned: Layout, folder: Path, progress: Progress | None = None) -> int:
    """Fill a new folder with what was planned; returns the bytes of its tensors."""
    copy_other_files(source.folder, folder)
    done = 0
    with FolderWriter(folder, [stored.slot for stored in planned.tensors]) as writer:
        for stored in planned.tensors:
            for piece in stored.pieces:
                writer.write(stored.slot.name, piece.read())
                done += piece.num_bytes
                if progress is not None:
                    progress(done, writer.total_bytes)
        sha256 = writer.close()
    config = planned.config
    if planned.section is not None:
        about = {**source.provenance, "exported_from": str(source.folder.resolve()), "content_sha256": sha256}
        config = config | {"quantization_config": {**planned.section, "provenance": about}}
    write_config(folder, config)
    return done
