"""Figures of runs and claims."""

import csv
import math
import re
import statistics
import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ders.reporting.tables import Row, has_control, less_dense, score_of

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
# Layers beside each other.
_COLUMNS = 5


def read_metrics(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Columns of a `metrics.csv` as (step, value) pairs, empty cells left out."""
    columns: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with file.open(newline="") as rows:
        for row in csv.DictReader(rows):
            for key, value in row.items():
                if value and key != "step":
                    columns[key].append((int(row["step"]), float(value)))
    return dict(columns)


def draw_run(folder: Path) -> list[Path]:
    """Loss, and each MoE layer's expert load, of one run: into `figures/` of its folder."""
    metrics = read_metrics(folder / "metrics.csv")
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    drawn = []
    with plt.rc_context(STYLE):
        if "train/loss" in metrics:
            figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
            axis.plot(*zip(*metrics["train/loss"], strict=True), linewidth=1)
            axis.set(xlabel="step", ylabel="loss per answer token", title="Training loss")
            drawn.append(save(figure, figures / "loss.png"))
        layers: dict[str, dict[int, list[tuple[int, float]]]] = defaultdict(dict)
        for key, points in metrics.items():
            if match := re.fullmatch(r"routing/(layer_\d+)/load_(\d+)", key):
                layers[match[1]][int(match[2])] = points
        if layers:
            columns = min(len(layers), _COLUMNS)
            lines = math.ceil(len(layers) / columns)
            size = (max(2.6 * columns, 5), 2.6 * lines)
            figure, axes = plt.subplots(
                lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
            )
            for axis, (layer, experts) in zip(axes.flat, sorted(layers.items(), key=_number), strict=False):
                axis.stackplot(
                    [step for step, _ in experts[0]],
                    [[v for _, v in experts[e]] for e in sorted(experts)],
                    labels=[f"expert {e}" for e in sorted(experts)],
                )
                axis.set(title=layer.replace("_", " "), ylim=(0, 1))
                axis.margins(x=0)
            for axis in axes.flat[len(layers) :]:
                axis.set_axis_off()
            figure.supxlabel("step", fontsize="medium")
            figure.supylabel("share of choices", fontsize="medium")
            figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
            drawn.append(save(figure, figures / "expert_load.png"))
    return drawn


def _number(item: tuple[str, object]) -> int:
    return int(item[0].split("_")[1])


def save(figure: plt.Figure, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file


def draw_claim(rows: list[Row], dial: str | None, title: str, file: Path) -> Path:
    """The score of a claim's rows, a line each from above as in its table, every seed a dot.

    Where the dense control is among them, scores are drawn less the control's of the same seed. Its own, the dense
    parent's and the question-only prior are told in the legend.
    """
    score = score_of([record for row in rows for record in row.records])
    metric, compared = f"test/{score.metric}", has_control(rows)
    values = less_dense(rows, metric) if compared else [row.scores(metric) for row in rows]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 1.7 + 0.36 * len(rows)), layout="constrained")
        for place, own in enumerate(values):
            scores = [score.factor * value for value in own]
            beside = [place + 0.12 * (i - (len(scores) - 1) / 2) for i in range(len(scores))]
            axis.plot(scores, beside, "o", color="C0", alpha=0.6, zorder=3, label="a seed" if place == 0 else None)
            if scores:
                ends, label = [place - 0.3, place + 0.3], "mean" if place == 0 else None
                axis.plot([statistics.mean(scores)] * 2, ends, color="C1", linewidth=2, label=label)
        if compared:
            control = score.factor * next(row.mean(metric) for row in rows if row.method == "dense")
            axis.axvline(0, color="0.4", linestyle="--", linewidth=1, label=f"dense control: {control:.4g}")
        first = rows[0].records[0]["metrics"]
        told = {"dense parent, before this stage": f"parent/{score.metric}"}
        if score.metric == "accuracy":
            told["question-only prior"] = "test/prior"
        for label, key in told.items():
            if key in first:
                axis.plot([], [], " ", label=f"{label}: {score.factor * first[key]['value']:.4g}")
        axis.set_yticks(range(len(rows)), [str(row.dials.get(dial, row.label)) if dial else row.label for row in rows])
        less = ",\nless the dense control's of the same seed" if compared else ""
        axis.set(xlabel=score.axis + less, ylabel=dial or "", ylim=(len(rows) - 0.5, -0.5))
        axis.locator_params(axis="x", nbins=6)
        figure.suptitle(textwrap.fill(title, 64), fontsize="large")
        axis.margins(x=0.1)
        # Closer together than this, differences are a few questions: they must not look large.
        left, right = axis.get_xlim()
        missing = max(0.0, 2 * score.fine - (right - left))
        axis.set_xlim(left - missing / 2, right + missing / 2)
        figure.legend(frameon=False, fontsize="small", loc="outside lower center", ncols=2)
        return save(figure, file)
