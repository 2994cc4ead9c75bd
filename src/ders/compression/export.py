"""Export from disk to disk: a few tensors in memory, whatever the model's size."""

from collections.abc import Callable
from pathlib import Path

from ders.checkpoint import (
    FolderWriter,
    ModelFolderError,
    copy_other_files,
    new_folder,
    refuse_overlap,
    write_config,
)
from ders.compression.layouts import LAYOUTS, Layout
from ders.compression.reading import read_source
from ders.compression.source import MoESource, Progress


def export_folder(
    checkpoint: Path | str,
    output: Path | str,
    *,
    layout: str,
    check: Callable[[MoESource, Layout, Path], None],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a trained MoE with full experts in another layout, tensor by tensor; returns the bytes of its tensors.

    Experts over a shared base are synthesised: W_base + Δ_e, added in fp32 and rounded to the folder's type. Stock
    classes compute router logits in the model's type, so there the router is rounded to it too.

    Args:
        checkpoint: any folder that `read_source` knows.
        output: the new folder; appears whole or not at all.
        layout: `vanilla` (ours), `mixtral` or `qwen2_moe` (Hugging Face's: plain transformers loads them).
        check: called with source, layout and the finished folder before it gets its name; what it raises removes it.
        overwrite: replace an existing model folder, once the new one is whole.
        progress: called with (bytes written, bytes to write).

    Raises:
        ModelFolderError: the layout cannot express the model (before anything is written; it says why, and which
            layout can), the folder is damaged, or there is no room.
    """
    refuse_overlap(Path(output), Path(checkpoint))
    if layout not in LAYOUTS:
        raise ModelFolderError(f"layout must be one of {', '.join(LAYOUTS)}: got {layout!r}")
    source = read_source(Path(checkpoint))
    planned = LAYOUTS[layout](source)
    with new_folder(Path(output), overwrite=overwrite) as unfinished:
        num_bytes = _write(source, planned, unfinished, progress)
        check(source, planned, unfinished)
    return num_bytes


def _write(source: MoESource, planned: Layout, folder: Path, progress: Progress | None) -> int:
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
