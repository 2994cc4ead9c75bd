"""Is this MoE compressible? Reads a trained MoE from disk, one projection of one layer at a time."""

from pathlib import Path

import torch
from torch import Tensor

from ders.checkpoint import ModelFolderError, Piece, TensorFolder
from ders.compression.compress import mean_of
from ders.compression.findings import Analysis, BaseChoice, LayerFindings, MatrixFindings, Spectrum
from ders.compression.reading import read_source
from ders.compression.source import MoESource, Progress, cast, dense_ffns
from ders.compression.statistics import (
    SKETCH_RANK,
    captured_energy,
    cosines,
    deltas,
    kurtosis,
    power_sums,
    ranks,
    reconstruction_errors,
)
from ders.compression.verdict import judge

SPECTRA = ("sketch", "full", "none")


def analyze_folder(
    checkpoint: Path | str,
    *,
    base: Path | str | None = None,
    spectrum: str = "sketch",
    progress: Progress | None = None,
) -> Analysis:
    """Compare the experts of a trained MoE's folder with the FFN they came from, and judge whether compression pays.

    Memory holds the E + 1 matrices of one projection, and none of those that lie in a file as they are: they are
    mapped. The first, middle and last MoE layers are looked at more closely: spectra and reconstruction errors.

    Args:
        checkpoint: a folder of any layout that `read_source` knows.
        base: folder of the dense model the MoE came from, or `"mean"` of its experts. None: the parent that the folder
            names, where it still exists; else the shared base in the file; else the mean.
        spectrum: of deltas: a `sketch` to rank 64 on those three layers, in `full` on every layer (minutes for a large
            model), or `none`.
        progress: called with (bytes read, bytes to read).

    Raises:
        ModelFolderError: a folder is damaged, weights are not finite, or the base has no such FFNs.
        ValueError: `spectrum` is none of these, or there is nothing to compare.
    """
    if spectrum not in SPECTRA:
        raise ValueError(f"spectrum must be one of {', '.join(SPECTRA)}: got {spectrum!r}")
    source = read_source(Path(checkpoint))
    choice, bases = _choose_base(source, base)
    upcycling, indices = source.upcycling, list(source.layers)
    if choice.kind == "mean" and upcycling.num_experts == 1:
        raise ValueError(f"{checkpoint}: one expert has nothing to be compared with: name its dense model, base=DIR")
    wide = torch.promote_types(source.dtype, torch.float32)
    closer = {indices[0], indices[len(indices) // 2], indices[-1]}
    total = sum(p.num_bytes for layer in source.layers.values() for stack in layer.experts.values() for p in stack)
    done, layers = 0, []
    for index, layer in source.layers.items():
        found: dict[str, MatrixFindings] = {}
        for name, stack in layer.experts.items():
            # A stored delta over a shared base is let go of when its last expert is read: read all, then choose.
            experts = [piece.read() for piece in stack][: upcycling.num_experts]
            base_OI = bases[index][name].read() if bases else mean_of(experts, wide)
            where = f"{source.folder}: {layer.prefix}.{name}"
            with_spectrum = spectrum == "full" or (spectrum == "sketch" and index in closer)
            found[name] = _look(base_OI, experts, where, spectrum if with_spectrum else "none", index in closer)
            done += sum(piece.num_bytes for piece in stack)
            if progress is not None:
                progress(done, total)
        layers.append(LayerFindings(index, found))
    delta = None if upcycling.delta is None else str(upcycling.delta["name"])
    return Analysis(
        checkpoint=str(source.folder),
        base=choice,
        dtype=str(source.dtype).removeprefix("torch."),
        num_experts=upcycling.num_experts,
        top_k=upcycling.top_k,
        delta=delta,
        universal=upcycling.universal,
        layers=layers,
        verdict=judge(layers, choice, delta, upcycling.universal),
    )


def _choose_base(source: MoESource, base: Path | str | None) -> tuple[BaseChoice, dict[int, dict[str, Piece]]]:
    """What to compare with; no pieces for the mean of experts."""
    if base == "mean":
        return BaseChoice("mean"), {}
    if base is not None:
        return BaseChoice("given", str(base)), _dense(source, Path(base))
    parent = source.provenance.get("parent")
    if parent is not None and Path(parent).is_dir():
        return BaseChoice("parent", str(parent)), _dense(source, Path(parent))
    if all(layer.base for layer in source.layers.values()):
        return BaseChoice("shared"), {index: layer.base for index, layer in source.layers.items()}
    return BaseChoice("mean"), {}


def _dense(source: MoESource, folder: Path) -> dict[int, dict[str, Piece]]:
    found = dense_ffns(TensorFolder(folder), source)
    # Experts began as the base in their own type: what that rounded away is no part of a delta.
    return {index: {name: cast(p, source.dtype) for name, p in pieces.items()} for index, pieces in found.items()}


def _look(base_OI: Tensor, experts: list[Tensor], where: str, spectrum: str, closer: bool) -> MatrixFindings:
    gram_FF, sums_E4 = power_sums(base_OI, experts)
    if not gram_FF.isfinite().all():
        raise ModelFolderError(f"{where}: holds weights that are not finite. The folder, or its base, is damaged")
    if gram_FF[0, 0] == 0:
        raise ValueError(f"{where}: the base is all zeros: nothing can be compared with it. Name another, base=DIR")
    captured: list[list[float] | None] = []
    errors: dict[str, list[float]] = {}
    if closer or spectrum != "none":
        for delta_OI in deltas(base_OI, experts):
            if spectrum != "none":
                captured.append(captured_energy(delta_OI, full=spectrum == "full"))
            if closer:
                for compression, error in reconstruction_errors(delta_OI).items():
                    errors.setdefault(compression, []).append(error)
    limit = max(base_OI.shape) if spectrum == "full" else SKETCH_RANK
    return MatrixFindings(
        shape=tuple(base_OI.shape),
        cosines=cosines(gram_FF).tolist(),
        ratios=(gram_FF.diagonal()[1:] / gram_FF[0, 0]).sqrt().tolist(),
        kurtoses=[kurtosis(sums_4, base_OI.numel()) for sums_4 in sums_E4],
        spectrum=Spectrum(ranks(base_OI.shape, limit), captured) if captured else None,
        errors=errors or None,
    )
