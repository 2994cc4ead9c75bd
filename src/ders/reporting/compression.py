"""What a byte buys: tables and figures of scores against the size of what is stored."""

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ders.reporting.figures import STYLE, save
from ders.reporting.tables import Row, caption, mib, percent, pipes


def compression_markdown(rows: list[Row], title: str, command: str) -> str:
    """The table of a compression claim: bytes, score, and the score less that of the very vanilla run compressed.

    The difference is taken seed by seed, so that what the seeds differ in cancels.
    """
    header = ["", "added parameters", "experts stored", "model stored", "accuracy", "less vanilla, points", "seeds"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in rows:
        first = row.records[0]
        differences = paired(row)
        lines.append(
            [
                row.label,
                f"{first['added_params']:,}",
                mib(first["expert_bytes"]) if first.get("expert_bytes") is not None else "",
                mib(first["stored_bytes"]),
                percent(row.mean("test/accuracy"), row.spread("test/accuracy")),
                f"{100 * mean(differences):+.2f} ± {100 * stdev(differences):.2f}" if len(differences) > 1 else "",
                str(len(row.records)),
            ]
        )
    records = [record for row in rows for record in row.records]
    for label, metric in [("dense parent", "parent/accuracy"), ("question-only prior", "test/prior")]:
        values = [record["metrics"][metric]["value"] for record in records if metric in record["metrics"]]
        if values:
            lines.append([f"*{label}*", "", "", "", percent(values[0]), "", ""])
    return f"{caption(records, title, command)}\n\n{pipes(lines)}\n"


def paired(row: Row) -> list[float]:
    """Per seed, the score less the vanilla run's before it was compressed; empty for rows that are no compression."""
    return [
        record["metrics"]["test/accuracy"]["value"] - record["metrics"]["vanilla/accuracy"]["value"]
        for record in row.records
        if "vanilla/accuracy" in record["metrics"]
    ]


def draw_against_bytes(rows: list[Row], title: str, file: Path) -> Path:
    """Test accuracy against the bytes of the stored experts, mean ± standard deviation over seeds: a curve per scheme.

    The vanilla model that was compressed, the dense parent and the controls without deltas are lines.
    """
    curves: dict[str, list[Row]] = defaultdict(list)
    controls: dict[str, Row] = {}
    for row in rows:
        if row.records[0].get("expert_bytes") is None or row.method == "base_only":
            controls[row.label] = row
        else:
            fixed = [str(value) if key == "selection" else f"{key} {value}" for key, value in _fixed(row).items()]
            curves[" ".join([row.method, *fixed])].append(row)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
        for number, (label, points) in enumerate(sorted(curves.items())):
            points = sorted(points, key=_mib)
            axis.errorbar(
                [_mib(row) for row in points],
                [100 * row.mean("test/accuracy") for row in points],
                yerr=[100 * row.spread("test/accuracy") for row in points],
                marker="os^vDP*X"[number % 8],
                linestyle="-" if number < 10 else "--",
                markersize=5,
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
                label=label,
            )
        for number, (label, row) in enumerate(sorted(controls.items())):
            style = ("-.", ":", (0, (5, 1)), (0, (1, 3)))[number % 4]
            axis.axhline(100 * row.mean("test/accuracy"), color="0.35", linestyle=style, linewidth=1, label=label)
        metrics = rows[0].records[0]["metrics"]
        if "parent/accuracy" in metrics:
            parent = 100 * metrics["parent/accuracy"]["value"]
            axis.axhline(parent, color="C3", linestyle="--", linewidth=1, label="dense parent")
        if "test/prior" in metrics:
            axis.plot([], [], " ", label=f"question-only prior: {100 * metrics['test/prior']['value']:.1f}")
        axis.set_xscale("log")
        axis.set(xlabel="stored experts (shared base and deltas), MiB", ylabel="test accuracy, %", title=title)
        axis.legend(frameon=False, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
        return save(figure, file)


def _fixed(row: Row) -> dict[str, object]:
    config = row.records[0]["config"]
    keys = ("selection", "rescale", "values_bits", "scheme", "symmetric", "granularity", "base")
    found = {key: config[key] for key in keys if config.get(key) not in (None, False)}
    if found.get("base") == "parent":
        del found["base"]
    if "values_bits" in found:  # the curve runs along it
        found["values_bits"] = "k"
    return found


def _mib(row: Row) -> float:
    return float(row.records[0]["expert_bytes"]) / 2**20
