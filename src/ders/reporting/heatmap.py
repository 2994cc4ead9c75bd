"""Figures of an analysis: expert similarity (figure 1 of arXiv 2503.01359), and the deltas' sizes and spectra."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ders.compression.findings import Analysis, LayerFindings
from ders.reporting.figures import STYLE, save

# So many layers are drawn in full; of more, the first and the last, as in the paper.
_FEW_LAYERS = 3
# So many rows and columns leave room for numbers in the cells.
_READABLE = 9


def draw_similarity(analysis: Analysis, file: Path) -> Path:
    """Cosines among the FFN and its experts, one heat map per layer and matrix, coloured from the smallest to 1."""
    layers = analysis.layers if len(analysis.layers) <= _FEW_LAYERS else [analysis.layers[0], analysis.layers[-1]]
    names = list(layers[0].matrices)
    cells = [c for layer in layers for m in layer.matrices.values() for row in m.cosines for c in row]
    smallest = min(cells)
    digits = _digits(smallest)
    first = "mean" if analysis.base.kind == "mean" else "FFN"
    labels = [first, *(f"E{e}" for e in range(1, analysis.num_experts + 1))]
    size = max(3.2, (0.36 + 0.07 * digits) * len(labels)) if len(labels) <= _READABLE else 4.0
    figure, axes = plt.subplots(
        len(layers),
        len(names),
        figsize=(size * len(names) + 1.2, size * len(layers) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for axes_row, layer in zip(axes, layers, strict=True):
        for axis, (name, matrix) in zip(axes_row, layer.matrices.items(), strict=True):
            # Experts that all equal their base leave no range: any below 1 will do.
            image = axis.imshow(matrix.cosines, vmin=min(smallest, 1 - 1e-6), vmax=1, cmap="viridis")
            axis.set_xticks(range(len(labels)), labels)
            axis.set_yticks(range(len(labels)), labels)
            axis.tick_params(length=0)
            axis.set_title(f"layer {layer.index}, {name}", fontsize="medium")
            if len(labels) <= _READABLE:
                for i, row in enumerate(matrix.cosines):
                    for j, cosine in enumerate(row):
                        dark = cosine < (smallest + 1) / 2
                        axis.text(
                            j,
                            i,
                            "1" if i == j else f"{cosine:.{digits}f}",
                            ha="center",
                            va="center",
                            fontsize="small",
                            color="white" if dark else "black",
                        )
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
    bar.ax.yaxis.set_major_formatter(plt.FormatStrFormatter(f"%.{digits}f"))
    return save(figure, file)


def _digits(smallest: float) -> int:
    """Decimals that show two digits of 1 − cosine: two to seven."""
    return min(7, max(2, 1 + math.ceil(-math.log10(max(1 - smallest, 1e-9)))))


def draw_deltas(analysis: Analysis, file: Path) -> Path:
    """Each layer's deltas against their base, a dot per expert; and, where measured, what few ranks capture of them."""
    closer = [layer for layer in analysis.layers if any(m.spectrum for m in layer.matrices.values())]
    with plt.rc_context(STYLE):
        panels = 2 if closer else 1
        figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4.2), squeeze=False, layout="constrained")
        _draw_ratios(axes[0][0], analysis)
        if closer:
            # Of a full analysis, too, three layers: more curves could not be told apart.
            _draw_spectra(axes[0][1], [closer[i] for i in sorted({0, len(closer) // 2, len(closer) - 1})])
        return save(figure, file)


def _draw_ratios(axis: plt.Axes, analysis: Analysis) -> None:
    layers = analysis.layers
    for number, name in enumerate(layers[0].matrices):
        beside = 0.12 * (number - (len(layers[0].matrices) - 1) / 2)
        ratios = [[100 * ratio for ratio in layer.matrices[name].ratios] for layer in layers]
        means = [sum(experts) / len(experts) for experts in ratios]
        axis.plot([i + beside for i in range(len(layers))], means, color=f"C{number}", linewidth=1, label=name)
        for place, experts in enumerate(ratios):
            axis.plot([place + beside] * len(experts), experts, "o", color=f"C{number}", markersize=4, alpha=0.6)
    step = -(-len(layers) // 12)
    axis.set_xticks(range(0, len(layers), step), [str(layer.index) for layer in layers[::step]])
    base = "mean" if analysis.base.kind == "mean" else "base"
    axis.set(xlabel="layer", ylabel=f"‖delta‖ / ‖{base}‖, %", title="Size of the deltas, a dot per expert")
    largest = 100 * max(ratio for layer in layers for m in layer.matrices.values() for ratio in m.ratios)
    axis.set_ylim(0, 1.1 * largest or 1)
    axis.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def _draw_spectra(axis: plt.Axes, layers: list[LayerFindings]) -> None:
    for style, layer in zip(("-", "--", ":"), layers, strict=False):
        for number, (name, matrix) in enumerate(layer.matrices.items()):
            assert matrix.spectrum is not None
            shares = [share for share in matrix.spectrum.captured if share is not None]
            if not shares:  # every delta is zero
                continue
            means = [100 * sum(values) / len(values) for values in zip(*shares, strict=True)]
            label = f"{layer.index} {name}"
            axis.plot(matrix.spectrum.ranks, means, style, color=f"C{number}", marker=".", linewidth=1, label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(plt.FormatStrFormatter("%d"))
    axis.set(xlabel="rank", ylabel="share of ‖delta‖², %", title="Captured by the leading ranks, mean of experts")
    axis.set_ylim(bottom=0)
    if axis.lines:
        axis.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
