"""Figures of the paper's tables: what it printed on the left, what our runs measured on the right, row by row."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ders.reporting.figures import STYLE, save
from ders.reporting.paper import DIALS, NAMES, Line, printed_score, scores
from ders.reporting.paper_table import reference
from ders.reporting.tables import spread

# From a loss of so many points on, differences are drawn on a scale that shows small ones too.
_COLLAPSE = 8
# A control so many points off the other rows would leave no room for their differences: its value is told only.
_NEAR = 5
_STYLES = {"dense": "--", "base_only": ":"}


def draw_paper(lines: list[Line], title: str, file: Path) -> Path:
    """Sweeps as lines over their dials, anything else as rows of scores."""
    return draw_sweeps(lines, title, file) if dials_of(lines) else draw_scores(lines, title, file)


def dials_of(lines: list[Line]) -> list[str]:
    """Methods that the paper prints at three settings or more for some model."""
    counts: dict[tuple[str | None, str], int] = {}
    for line in lines:
        if line.printed and line.key.dial is not None and not line.key.frozen_base:
            counts[line.key.model, line.key.method] = counts.get((line.key.model, line.key.method), 0) + 1
    return list(dict.fromkeys(method for (_, method), count in counts.items() if count > 2))


def draw_scores(lines: list[Line], title: str, file: Path) -> Path:
    """A pair of panels per model: the printed overall score, and ours with every seed a dot and the mean a bar."""
    models = list(dict.fromkeys(line.key.model for line in lines))
    longest = max(sum(line.key.model == model and _is_row(line) for line in lines) for model in models)
    with plt.rc_context(STYLE):
        size = (11, (0.42 * longest + 1.15) * len(models) + 0.5)
        figure, axes = plt.subplots(len(models), 2, figsize=size, squeeze=False, layout="constrained")
        for (left, right), model in zip(axes, models, strict=True):
            mine = [line for line in lines if line.key.model == model]
            rows = [line for line in mine if _is_row(line)]
            for place, line in enumerate(rows):
                if line.printed:
                    left.plot(printed_score(line.printed), place, "D", color="C1", markersize=7)
                if line.ours and (values := list(scores(line.ours).values())):
                    right.plot(values, [place] * len(values), "o", color="C0", alpha=0.6, zorder=3)
                    right.plot([mean(values)] * 2, [place - 0.3, place + 0.3], color="C1", linewidth=2.5)
            _references(right, mine)
            for axis in (left, right):
                axis.set_ylim(len(rows) - 0.4, -0.6)
                axis.set_yticks(range(len(rows)), [line.key.label for line in rows])
            right.tick_params(labelleft=False)
            _same_width(left, right)
            left.set_title(f"{NAMES.get(model or '', model)}: printed", fontsize="medium")
            right.set_title("ours: a dot per seed, the mean a bar", fontsize="medium")
        for axis in axes[-1]:
            axis.set_xlabel("score, %")
        figure.suptitle(title)
        return save(figure, file)


def _same_width(left: plt.Axes, right: plt.Axes) -> None:
    """A point is as wide on both panels: a difference looks the same, printed or measured."""
    limits = [axis.get_xlim() for axis in (left, right)]
    width = max(1.0, *(1.1 * (high - low) for low, high in limits))
    for axis, (low, high) in zip((left, right), limits, strict=True):
        axis.set_xlim((low + high - width) / 2, (low + high + width) / 2)


def _is_row(line: Line) -> bool:
    """What gets a place of its own: the paper's rows, and controls that are no line across them."""
    return line.printed is not None or line.key.method not in _STYLES


def _references(axis: plt.Axes, lines: list[Line]) -> None:
    """Lines across a panel: controls without experts, without deltas, and without any training or picture."""
    low, high = axis.get_xlim()
    for line in lines:
        if not _is_row(line) and line.ours and (values := scores(line.ours).values()):
            value, style = mean(values), _STYLES[line.key.method]
            if low - _NEAR < value < high + _NEAR:
                axis.axvline(value, color="0.3", linestyle=style, linewidth=1.2, zorder=1)
            axis.plot([], [], style, color="0.3", label=f"{line.key.label}: {value:.1f}")
    metrics = [record["metrics"] for line in lines if line.ours for record in line.ours.records]
    for kind, name in (("parent", "dense parent"), ("prior", "question-only prior")):
        value = next((v for found in metrics if (v := reference(found, kind)) is not None), None)
        if value is not None:  # far below the rest, as a rule: told, not drawn
            axis.plot([], [], " ", label=f"{name}: {value:.1f}")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def draw_sweeps(lines: list[Line], title: str, file: Path) -> Path:
    """A pair of panels per dial: points lost or won against vanilla as printed, and ours with a dot per seed."""
    methods = dials_of(lines)
    models = list(dict.fromkeys(line.key.model for line in lines))
    with plt.rc_context(STYLE):
        size = (11, 3.7 * len(methods) + 0.4)
        figure, axes = plt.subplots(len(methods), 2, figsize=size, sharey="row", squeeze=False, layout="constrained")
        for (left, right), method in zip(axes, methods, strict=True):
            swept = [line for line in lines if line.key.method == method and not line.key.frozen_base]
            places = {dial: place for place, dial in enumerate(sorted({line.key.dial or 0 for line in swept}))}
            if method == "quantize":  # the strongest compression to the right, as for sparsity
                places = {dial: len(places) - 1 - place for dial, place in places.items()}
            for number, model in enumerate(models):
                rows = sorted(
                    (line for line in swept if line.key.model == model), key=lambda x: places[x.key.dial or 0]
                )
                _draw_curves(left, right, rows, places, f"C{number}", NAMES.get(model or "", str(model)))
                controls = [line for line in lines if line.key.model == model and line.key.method in _STYLES]
                _draw_controls(right, controls, f"C{number}")
            for axis in (left, right):
                axis.axhline(0, color="0.2", linewidth=1)
                axis.set_xticks(list(places.values()), [f"{dial:g}" for dial in places])
                axis.set(xlabel=DIALS[method], xlim=(-0.3, len(places) - 0.7))
            if _lowest(lines) < -_COLLAPSE:
                left.set_yscale("symlog", linthresh=1)
                left.set_ylim(bottom=1.5 * _lowest(lines))
                left.set_yticks([-50, -20, -10, -5, -2, -1, 0, 1], minor=False)
                left.yaxis.set_major_formatter("{x:g}")
            left.set_ylabel("less vanilla, points")
            left.set_title(f"{method}: printed", fontsize="medium")
            right.set_title("ours: a dot per seed, the line their mean", fontsize="medium")
            right.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        figure.suptitle(title)
        return save(figure, file)


def _draw_curves(
    left: plt.Axes, right: plt.Axes, rows: list[Line], places: dict[float, int], color: str, name: str
) -> None:
    printed = [(places[line.key.dial or 0], line.printed_less_vanilla) for line in rows]
    left.plot(*_columns([(x, y) for x, y in printed if y is not None]), "D-", color=color, markersize=5)
    run = [(places[line.key.dial or 0], line.less_vanilla) for line in rows if line.less_vanilla]
    right.plot(*_columns([(x, mean(y)) for x, y in run]), "-", color=color, label=name)
    right.plot(*_columns([(x, value) for x, y in run for value in y]), "o", color=color, markersize=4, alpha=0.6)


def _draw_controls(axis: plt.Axes, lines: list[Line], color: str) -> None:
    for line in lines:
        if line.less_vanilla:
            value, noise = mean(line.less_vanilla), spread(line.less_vanilla)
            label = f"{line.key.label}: {value:+.1f}" + (f" ± {noise:.1f}" if noise == noise else "")
            axis.axhline(value, color=color, linestyle=_STYLES[line.key.method], linewidth=1, label=label)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _lowest(lines: list[Line]) -> float:
    differences = [line.printed_less_vanilla for line in lines if line.printed_less_vanilla is not None]
    return min([0.0, *differences, *(value for line in lines for value in line.less_vanilla)])
