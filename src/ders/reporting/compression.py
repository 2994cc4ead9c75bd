"""What a byte buys: tables and figures of scores against the size of what is stored."""

import textwrap
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ders.reporting.figures import STYLE, save
from ders.reporting.tables import (
    Row,
    caption,
    difference,
    mib,
    nats,
    percent,
    pipes,
    score_of,
    scored_by_likelihood,
    spread,
)


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
        own = [nats(row.mean("test/loss"), row.spread("test/loss")), difference(paired(row, "loss"), 4)]
        lines.append(
            [
                row.label,
                f"{first['added_params']:,}",
                mib(first["expert_bytes"]) if first.get("expert_bytes") is not None else "",
                mib(first["stored_bytes"]),
                *(own if loss else []),
                percent(row.mean("test/accuracy"), row.spread("test/accuracy")),
                difference([100 * value for value in paired(row)], 2),
                str(len(row.records)),
            ]
        )
    metrics = records[0]["metrics"]
    for label, key in [("dense parent", "parent/accuracy"), ("question-only prior", "test/prior")]:
        if key in metrics:
            own = [nats(metrics["parent/loss"]["value"]) if loss and key == "parent/accuracy" else "", ""]
            cells = [*(own if loss else []), percent(metrics[key]["value"]), "", ""]
            lines.append([f"*{label}*", "", "", "", *cells])
    return f"{caption(records, title, command)}\n\n{pipes(lines)}\n"


def paired(row: Row, metric: str = "accuracy") -> list[float]:
    """Per seed, the score less the vanilla run's before it was compressed; empty for rows that are no compression."""
    return [
        record["metrics"][f"test/{metric}"]["value"] - record["metrics"][f"vanilla/{metric}"]["value"]
        for record in row.records
        if f"vanilla/{metric}" in record["metrics"]
    ]


def draw_against_bytes(rows: list[Row], title: str, file: Path) -> Path:
    """What each scheme costs against the bytes of the stored experts: a curve per scheme, seeds paired.

    Points are the mean difference to the very vanilla run that was compressed, ± its standard deviation over seeds,
    upwards better; beyond what is fine the axis is logarithmic. The controls without deltas and the dense parent are
    lines.
    """
    compressed = [row for row in rows if paired(row)]
    records = [record for row in compressed for record in row.records]
    score = score_of(records)
    unit = score.sign * score.factor
    curves: dict[str, list[Row]] = defaultdict(list)
    lines: dict[str, float] = {}
    for row in compressed:
        if row.method == "base_only":
            lines[f"no deltas, base: {row.records[0]['config']['base']}"] = unit * mean(paired(row, score.metric))
        else:
            curves[_scheme(row)].append(row)
    first = records[0]["metrics"]
    if f"parent/{score.metric}" in first:
        before = mean(record["metrics"][f"vanilla/{score.metric}"]["value"] for record in records)
        parent = first[f"parent/{score.metric}"]["value"]
        lines["dense parent, never trained further"] = unit * (parent - before)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
        axis.axhline(0, color="0.2", linewidth=1)
        for number, (label, points) in enumerate(sorted(curves.items())):
            points = sorted(points, key=_mib)
            costs = [paired(row, score.metric) for row in points]
            axis.errorbar(
                [_mib(row) for row in points],
                [unit * mean(values) for values in costs],
                yerr=[score.factor * spread(values) for values in costs],
                marker="os^vDP*X"[number % 8],
                linestyle="-" if number < 10 else "--",
                color=f"C{number % 10}",
                markersize=5,
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
                label=label,
            )
        for (label, value), style in zip(sorted(lines.items()), ("--", "-.", ":"), strict=False):
            axis.axhline(value, color="0.35", linestyle=style, linewidth=1, label=label)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.set_yscale("symlog", linthresh=score.fine, linscale=2, subs=[2, 5])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(True, axis="y", which="minor")
        axis.set(xlabel="stored experts (shared base and deltas), MiB", ylabel=score.gain)
        figure.suptitle(textwrap.fill(title, 72), fontsize="large")
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
