"""Figures of runs and claims."""

import csv
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

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
                    steps, [[v for _, v in experts[e]] for e in sorted(experts)], labels=[f"expert {e}" for e in experts]
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
