"""Figures of runs and claims."""

import csv
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ders.reporting.tables import Row

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}


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
            figure, axes = plt.subplots(
                1, len(layers), figsize=(max(4 * len(layers), 5), 3.5), sharey=True, squeeze=False, layout="constrained"
            )
            for axis, (layer, experts) in zip(axes[0], sorted(layers.items(), key=_number), strict=True):
                steps = [step for step, _ in experts[0]]
                axis.stackplot(
                    steps,
                    [[v for _, v in experts[e]] for e in sorted(experts)],
                    labels=[f"expert {e}" for e in sorted(experts)],
                )
                axis.set(xlabel="step", title=layer.replace("_", " "), ylim=(0, 1))
            axes[0][0].set_ylabel("share of choices")
            axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
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
    """Test accuracy of a claim's rows, every seed a dot: over a dial, or one place per row.

    The dense parent is a line; the question-only prior, far below, is told in the legend.
    """
    metric = "test/accuracy"
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
        for place, row in enumerate(rows):
            scores = [100 * score for score in row.scores(metric)]
            beside = [place + 0.08 * (i - (len(scores) - 1) / 2) for i in range(len(scores))]
            axis.plot(beside, scores, "o", color="C0", alpha=0.6, zorder=3, label="a seed" if place == 0 else None)
            mean = [100 * row.mean(metric)] * 2
            axis.plot([place - 0.2, place + 0.2], mean, color="C1", linewidth=2, label="mean" if place == 0 else None)
        first = rows[0].records[0]["metrics"]
        if "parent/accuracy" in first:
            parent = 100 * first["parent/accuracy"]["value"]
            axis.axhline(parent, color="0.4", linestyle="--", linewidth=1, label="dense parent, before this stage")
        if "test/prior" in first:
            axis.plot([], [], " ", label=f"question-only prior: {100 * first['test/prior']['value']:.1f}")
        names = [str(row.dials.get(dial, row.label)) if dial else row.label.replace(" ", "\n", 1) for row in rows]
        axis.set_xticks(range(len(rows)), names)
        axis.set(xlabel=dial or "", ylabel="test accuracy, %", title=title, xlim=(-0.5, len(rows) - 0.5))
        axis.margins(y=0.2)
        axis.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)
        return save(figure, file)
