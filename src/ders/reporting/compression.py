"""What a byte buys: tables and figures of scores against the size of what is stored."""

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ders.reporting.figures import STYLE, save
from ders.reporting.tables import Row, caption, mib, nats, percent, pipes, scored_by_likelihood


def compression_markdown(rows: list[Row], title: str, command: str) -> str:
    """The table of a compression claim: bytes, score, and the score less that of the very vanilla run compressed.

    The difference is taken seed by seed, so that what the seeds differ in cancels.
    """
    records = [record for row in rows for record in row.records]
    loss = ["loss", "less vanilla"] if scored_by_likelihood(records) else []
    sizes = ["added parameters", "experts stored", "model stored"]
    header = ["", *sizes, *loss, "accuracy", "less vanilla, points", "seeds"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in rows:
        first = row.records[0]
        differences, costs = paired(row), paired(row, "loss")
        own = [
            nats(row.mean("test/loss"), row.spread("test/loss")),
            f"{mean(costs):+.4f} ± {stdev(costs):.4f}" if len(costs) > 1 else "",
        ]
        lines.append(
            [
                row.label,
                f"{first['added_params']:,}",
                mib(first["expert_bytes"]) if first.get("expert_bytes") is not None else "",
                mib(first["stored_bytes"]),
                *(own if loss else []),
                percent(row.mean("test/accuracy"), row.spread("test/accuracy")),
                f"{100 * mean(differences):+.2f} ± {100 * stdev(differences):.2f}" if len(differences) > 1 else "",
                str(len(row.records)),
            ]
        )
    for label, metric in [("dense parent", "parent/accuracy"), ("question-only prior", "test/prior")]:
        values = [record["metrics"][metric]["value"] for record in records if metric in record["metrics"]]
        if values:
            lines.append([f"*{label}*", "", "", "", *[""] * len(loss), percent(values[0]), "", ""])
    return f"{caption(records, title, command)}\n\n{pipes(lines)}\n"


def paired(row: Row, metric: str = "accuracy") -> list[float]:
    """Per seed, the score less the vanilla run's before it was compressed; empty for rows that are no compression."""
    return [
        record["metrics"][f"test/{metric}"]["value"] - record["metrics"][f"vanilla/{metric}"]["value"]
        for record in row.records
        if f"vanilla/{metric}" in record["metrics"]
    ]


def draw_against_bytes(rows: list[Row], title: str, file: Path) -> Path:
    """What each scheme costs in accuracy against the bytes of the stored experts: a curve per scheme, seeds paired.

    Points are the mean difference to the very vanilla run that was compressed, ± its standard deviation over seeds.
    The controls without deltas and the dense parent are lines; points far below them stand at the lower edge, with
    their value.
    """
    curves: dict[str, list[Row]] = defaultdict(list)
    lines: dict[str, float] = {}
    for row in rows:
        if row.method == "base_only":
            base = row.records[0]["config"]["base"]
            lines[f"no deltas, base: {base}"] = 100 * mean(paired(row))
        elif paired(row):
            curves[_scheme(row)].append(row)
    first = next(row for row in rows if paired(row)).records[0]["metrics"]
    if "parent/accuracy" in first:
        before = [
            record["metrics"]["vanilla/accuracy"]["value"] for row in rows for record in row.records if paired(row)
        ]
        lines["dense parent, never trained further"] = 100 * (first["parent/accuracy"]["value"] - mean(before))
    floor = min([-1.0, *lines.values()]) - 0.6
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
        axis.axhline(0, color="0.2", linewidth=1)
        for number, (label, points) in enumerate(sorted(curves.items())):
            points = sorted(points, key=_mib)
            values = [100 * mean(paired(row)) for row in points]
            color = f"C{number % 10}"
            axis.errorbar(
                [_mib(row) for row in points],
                [max(value, floor + 0.12) for value in values],
                yerr=[
                    100 * stdev(paired(row)) if value > floor else 0 for row, value in zip(points, values, strict=True)
                ],
                marker="os^vDP*X"[number % 8],
                linestyle="-" if number < 10 else "--",
                color=color,
                markersize=5,
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
                label=label,
            )
            for row, value in zip(points, values, strict=True):
                if value <= floor:
                    place = (_mib(row), floor + 0.12)
                    axis.annotate(
                        f"{value:.1f}",
                        place,
                        (0, 7 + 9 * (number % 3)),
                        textcoords="offset points",
                        ha="center",
                        fontsize=7,
                        color=color,
                    )
        for (label, value), style in zip(sorted(lines.items()), ("--", "-.", ":"), strict=False):
            axis.axhline(value, color="0.35", linestyle=style, linewidth=1, label=label)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.set_ylim(bottom=floor)
        axis.set(xlabel="stored experts (shared base and deltas), MiB", ylabel="test accuracy less vanilla, points")
        axis.set_title(title)
        axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        return save(figure, file)


def _scheme(row: Row) -> str:
    """What one curve is: everything but what it runs along (sparsity, bits, rank)."""
    config = row.records[0]["config"]
    words = [row.method]
    for key in ("selection", "scheme", "granularity"):
        words += [config[key]] if config.get(key) else []
    words += [word for word in ("symmetric", "rescale") if config.get(word)]
    if row.method == "sparsify" and not config["rescale"]:
        words.append("not rescaled")
    if config.get("values_bits"):
        words.append("k-bit values")
    if config["base"] != "parent":
        words.append(f"base {config['base']}")
    return " ".join(words)


def _mib(row: Row) -> float:
    return float(row.records[0]["expert_bytes"]) / 2**20
