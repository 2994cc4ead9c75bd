"""Figures of runs and claims."""

import csv
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ders.reporting.tables import Row

_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}


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
    with plt.rc_context(_STYLE):
        if "train/loss" in metrics:
            figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
            axis.plot(*zip(*metrics["train/loss"], strict=True), linewidth=1)
            axis.set(xlabel="step", ylabel="loss per answer token", title="Training loss")
            drawn.append(_save(figure, figures / "loss.png"))
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
                    labels=[f"expert {e}" for e in experts],
                )
                axis.set(xlabel="step", title=layer.replace("_", " "), ylim=(0, 1))
            axes[0][0].set_ylabel("share of choices")
            axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
            drawn.append(_save(figure, figures / "expert_load.png"))
    return drawn


def _number(item: tuple[str, object]) -> int:
    return int(item[0].split("_")[1])


def _save(figure: plt.Figure, file: Path) -> Path:
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file


def draw_claim(rows: list[Row], dial: str | None, title: str, file: Path) -> Path:
    """Test accuracy of a claim's rows, every seed a dot: over a dial, or one place per row.

    The dense parent and the question-only prior are drawn as lines.
    """
    metric = "test/accuracy"
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
        places = range(len(rows))
        names = [str(row.dials.get(dial, row.label)) if dial else row.label for row in rows]
        for place, row in zip(places, rows, strict=True):
            scores = [100 * score for score in row.scores(metric)]
            axis.plot([place] * len(scores), scores, "o", color="C0", alpha=0.5, zorder=3)
            axis.plot([place - 0.15, place + 0.15], [100 * row.mean(metric)] * 2, color="C0", linewidth=2.5, zorder=3)
        first = rows[0].records[0]["metrics"]
        for key, label, style in [
            ("parent/accuracy", "dense parent", "--"),
            ("test/prior", "question-only prior", ":"),
        ]:
            if key in first:
                axis.axhline(100 * first[key]["value"], color="0.4", linestyle=style, linewidth=1, label=label)
        axis.set_xticks(list(places), names)
        axis.set(xlabel=dial or "", ylabel="test accuracy, %", title=title, xlim=(-0.5, len(rows) - 0.5))
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.12))
        return _save(figure, file)
