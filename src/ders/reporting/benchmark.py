"""Tables and figures of the speed benchmarks: one layer, decoding, whole models."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ders.reporting.figures import STYLE, save
from ders.reporting.tables import pipes

Record = dict[str, Any]
Row = dict[str, Any]

_BEST = "vanilla, the fastest"


def publish(record: Record, folder: Path) -> Path:
    """Write `record.json`, `table.md`, `goals.md` (its head alone) and `figure.png` into a folder; returns the record's
    path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "record.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    (folder / "table.md").write_text(markdown(record))
    (folder / "goals.md").write_text("\n\n".join(_opening(record)) + "\n")
    draw(record, folder / "figure.png")
    return file


def markdown(record: Record) -> str:
    """Goals first, each met or missed; then everything that was measured."""
    parts = _opening(record)
    rows = record.get("rows", [])
    for key in dict.fromkeys(_panel(row) for row in rows):
        parts.append(f"**{key}**\n\n{_layer_table([row for row in rows if _panel(row) == key])}")
    models = record.get("models", [])
    for model in dict.fromkeys(row["model"] for row in models):
        parts.append(f"**{model}**\n\n{_model_table([row for row in models if row['model'] == model])}")
    if record.get("memory"):
        parts.append(f"**Memory**\n\n{_memory_table(record['memory'])}")
    if others := _unavailable(record.get("unavailable", [])):
        parts.append(others)
    return "\n\n".join(parts) + "\n"


def _opening(record: Record) -> list[str]:
    return [_head(record), _goals(record["goals"])]


def _head(record: Record) -> str:
    hardware, dials = record["hardware"], record["dials"]
    commit = (record["commit"] or "unknown")[:10]
    machine = ", ".join(hardware["gpus"]) if dials["device"] == "cuda" else f"{hardware['cores']} cores of "
    machine += "" if dials["device"] == "cuda" else hardware["cpu"]
    lines = [
        f"`{record['command']}`, commit {commit}, {machine}, {dials['threads']} threads, {dials['dtype']}, "
        f"torch {record['versions']['torch']}, transformers {record['versions']['transformers']}, "
        f"{record['seconds']:.0f} s.",
        "",
        "Times are medians; ratios are medians [quartiles] over rounds in which dense ran before and after each "
        "variant. Dense is the Hugging Face MLP in eager mode, which has no router; an MoE layer's time holds one.",
    ]
    if "ceilings" in record:
        limits = record["ceilings"]
        lines += [
            "",
            f"Roofline of this machine in {dials['dtype']}, measured: "
            f"{limits['read_bytes_per_second'] / 1e9:,.0f} GB/s read, "
            f"{limits['copy_bytes_per_second'] / 1e9:,.0f} GB/s copied (read + written), "
            f"{limits['flops_per_second'] / 1e12:,.3g} TFLOP/s. "
            "`of roofline` is the least time for a layer's own work over its time; weights that stay in a cache can "
            "take it above 100 %.",
        ]
    return "\n".join(lines)


def _goals(goals: list[Row]) -> str:
    met = sum(goal["met"] for goal in goals)
    lines = [[f"goal ({met} of {len(goals)} met)", "figure", "limit", ""], ["---", "---:", "---:", "---"]]
    for goal in goals:
        verdict = "met" if goal["met"] else "**missed**"
        lines.append([goal["goal"], _number(goal["figure"]), _number(goal["limit"]), verdict])
    return pipes(lines)


def _panel(row: Row) -> str:
    return f"{row['shape']}, E {row['experts']}, top-{row['top_k']}, {row['direction']}"


def _layer_table(rows: list[Row]) -> str:
    header = ["T", "", "ms", "CPU ms", "to dense", "to vanilla", "to rebuilt W_e", "error", "of roofline", "rounds"]
    lines = [header, ["---:", "---", *["---:"] * (len(header) - 2)]]
    for row in rows:
        name = f"{row['method']} (fastest)" if row.get("best") else row["method"]
        lines.append(
            [
                str(row["tokens"]),
                name,
                _number(row["ms"]),
                _number(row["cpu_ms"]),
                _spread(row.get("to_dense")),
                _spread(row.get("to_vanilla")),
                _spread(row.get("to_rebuilt"), digits=2),
                "" if row["error"] is None else f"{row['error']:.1e}",
                f"{100 * row['of_roofline']:.3g} %",
                str(row["rounds"]),
            ]
        )
    return pipes(lines)


def _model_table(rows: list[Row]) -> str:
    header = ["", "sequences × tokens", "", "ms", "tokens/s", "to dense", "to vanilla", "weights", "rounds"]
    lines = [header, ["---", "---", "---", *["---:"] * (len(header) - 3)]]
    for row in rows:
        lines.append(
            [
                row["phase"],
                f"{row['batch']} × {row['length']}",
                row["method"],
                _number(row["ms"]),
                _number(row["tokens_per_second"]),
                _spread(row.get("to_dense")),
                _spread(row.get("to_vanilla")),
                _megabytes(row["weight_bytes"]),
                str(row["rounds"]),
            ]
        )
    return pipes(lines)


def _memory_table(rows: list[Row]) -> str:
    sizes = [key for key in rows[0] if key.endswith("_bytes")]
    names = {
        "saved_bytes": "kept for backward",
        "peak_bytes": "peak above weights and input",
        "state_bytes": "weights, gradients, AdamW",
        "training_peak_bytes": "peak of a training step",
        "generation_peak_bytes": "peak of generation",
    }
    header = ["", "", *(part for key in sizes for part in (names[key], "to dense"))]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for row in rows:
        where = row.get("model") or f"{row['shape']}, T {row['tokens']}"
        cells = []
        for key in sizes:
            ratio = row.get(f"{key}_to_dense", row.get(f"{key.removesuffix('_bytes')}_to_dense"))
            cells += [_megabytes(row[key]), "" if ratio is None else f"{ratio:.3f}"]
        lines.append([where, row["method"], *cells])
    return pipes(lines)


def _unavailable(rows: list[Row]) -> str:
    lines = [
        f"- {row['method']}: {row['reason']} ({len(row['cells'])} cell{'s' if len(row['cells']) > 1 else ''})"
        for row in rows
    ]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _spread(ratio: Row | None, digits: int = 2) -> str:
    if ratio is None:
        return ""
    low, median, high = (f"{ratio[key]:.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} [{low}–{high}]"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f} MB"


def draw(record: Record, file: Path) -> Path:
    """Time over dense: against T for layers, one panel per shape and direction; by form for whole models."""
    rows, models = record.get("rows", []), record.get("models", [])
    panels = list(dict.fromkeys(_panel(row) for row in rows))
    names = list(dict.fromkeys(row["model"] for row in models))
    count = len(panels) + len(names)
    columns = min(count, 2)
    lines = -(-count // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            lines, columns, figsize=(6.2 * columns, 3.9 * lines), squeeze=False, layout="constrained"
        )
        places = list(axes.flat)
        for axis, panel in zip(places, panels, strict=False):
            _draw_layer(axis, panel, [row for row in rows if _panel(row) == panel])
        for axis, name in zip(places[len(panels) :], names, strict=False):
            _draw_model(axis, name, [row for row in models if row["model"] == name])
        for axis in places[count:]:
            axis.set_visible(False)
        return save(figure, file)


def _curves(rows: list[Row]) -> dict[str, list[tuple[int, Row]]]:
    """By method (T, spread of the ratio to dense), the vanilla layers as one: the fastest at each T."""
    curves: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        if row["role"] == "dense" or (row["role"] == "vanilla" and not row["best"]):
            continue
        name = _BEST if row["role"] == "vanilla" else row["method"]
        curves.setdefault(name, []).append((row["tokens"], row["to_dense"]))
    return curves


def _draw_layer(axis: plt.Axes, title: str, rows: list[Row]) -> None:
    styles = {_BEST: {"color": "0.35", "linestyle": "--"}, "rebuilt W_e": {"color": "0.7", "linestyle": ":"}}
    curves = _curves(rows)
    for place, (name, points) in enumerate(curves.items()):
        beside = 2 ** (0.12 * (place - (len(curves) - 1) / 2))
        tokens = [beside * t for t, _ in points]
        style = styles.get(name, {})
        (line,) = axis.plot(
            tokens, [r["median"] for _, r in points], marker="o", markersize=4, linewidth=1.2, label=name, **style
        )
        low, high = ([ratio[key] for _, ratio in points] for key in ("low", "high"))
        axis.vlines(tokens, low, high, color=line.get_color(), alpha=0.35, linewidth=3)
    tokens = sorted({row["tokens"] for row in rows})
    _scale(axis, title)
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [str(t) for t in tokens])
    axis.set_xlim(tokens[0] / 2, tokens[-1] * 2)
    axis.set_xlabel("tokens T")


def _draw_model(axis: plt.Axes, title: str, rows: list[Row]) -> None:
    phases = list(dict.fromkeys((row["phase"], row["batch"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if "to_dense" in row))
    for number, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        beside = 0.12 * (number - (len(methods) - 1) / 2)
        places = [phases.index((row["phase"], row["batch"])) + beside for row in mine]
        style = {"color": "0.35", "marker": "s"} if method.startswith("vanilla") else {"marker": "o"}
        medians, low, high = ([row["to_dense"][key] for row in mine] for key in ("median", "low", "high"))
        (line,) = axis.plot(places, medians, linestyle="none", markersize=5, label=method, **style)
        axis.vlines(places, low, high, color=line.get_color(), alpha=0.35, linewidth=3)
    _scale(axis, title)
    axis.set_xticks(range(len(phases)), [f"{phase}\nbatch {batch}" for phase, batch in phases])
    axis.margins(x=0.1)


def _scale(axis: plt.Axes, title: str) -> None:
    axis.axhline(1, color="0.4", linewidth=1)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    steps = (1, 1.2, 1.5, 2, 3, 5, 7) if high / low < 30 else (1, 2, 5) if high / low < 1000 else (1,)
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(base=10, subs=steps))
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_ylabel("time over dense")
    axis.set_title(title, fontsize="medium")
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
