"""A claim's table in three groups: what the paper printed, what its formula gives, what our runs measured."""

import math
from statistics import mean
from typing import Any

from ders.reporting.paper import NAMES, Line, Published, printed_score, scores
from ders.reporting.paper_notes import Added, Formula, Notes, counted
from ders.reporting.tables import mib, pipes, spread

_CONTROLS = {
    "dense": "dense, the same training",
    "base_only": "no deltas: every expert is the base",
}
STAND_INS = (
    "At scale tiny the models and the data are small stand-ins: our scores are of another task than the paper's, and "
    "only differences between methods can be compared."
)
_COMPRESSED = ("sparsify", "quantize")
_REFERENCES = {"dense parent, before this stage": "parent", "question-only prior": "prior"}


def paper_markdown(lines: list[Line], published: Published, formula: Formula, title: str, command: str) -> str:
    """The table, with a note for each misprinted cell, and how many counts are as printed."""
    notes = Notes(published)
    header = ["", "", "printed: added", "score", "less vanilla", "formula: added"]
    header += ["ours: added", "score", "less vanilla", "seeds"]
    table = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for model in dict.fromkeys(line.key.model for line in lines):
        mine = [line for line in lines if line.key.model == model]
        cells = [_cells(line, formula, notes) for line in mine] + _references(mine)
        cells[0][0] = NAMES.get(model or "", model or "")
        table += cells
    parts = [caption(lines, title, command), pipes(table)]
    if any(line.printed and "cost" in line.printed for line in lines):
        parts += [pipes(cost_table(lines)), _COST_NOTE]
    parts.append(counted(lines, published, formula))
    if any(line.ours and line.key.method in _COMPRESSED for line in lines):
        parts.append(_COMPRESSED_NOTE)
    if notes.texts:
        parts.append("\n".join(f"- <sup>{number}</sup> {text}" for number, text in enumerate(notes.texts.values(), 1)))
    return "\n\n".join(parts) + "\n"


def caption(lines: list[Line], title: str, command: str) -> str:
    """What the table shows, from how many runs, of which scale, and how to make it again."""
    records = [record for line in lines if line.ours for record in line.ours.records]
    scales = sorted({record["scale"] for record in records})
    seeds = sorted({len(line.ours.records) for line in lines if line.ours})
    commits = sorted({str(record["commit"])[:10] for record in records})
    text = (
        f"**{title}.** Scores in percent; ours at scale {', '.join(scales)}, mean ± standard deviation over "
        f"{' or '.join(map(str, seeds))} seeds, differences to vanilla in points, seed by seed; – is not run or not "
        f"scored.\n"
        f"`{command}`, commit {', '.join(commits)}."
    )
    if "tiny" in scales:
        text += f"\n{STAND_INS}"
    return text


def _cells(line: Line, formula: Formula, notes: Notes) -> list[str]:
    row, ours = line.printed, line.ours
    label = line.key.label if row else f"*{_CONTROLS.get(line.key.label, line.key.label)}*"
    printed = ["", "", "", ""]
    if row and line.table:
        printed = [
            _added(row["added_params"]) + notes.mark(line.table, row, "added_params"),
            f"{printed_score(row):.1f}" + notes.mark(line.table, row, "scores"),
            "" if line.printed_less_vanilla is None else f"{round(line.printed_less_vanilla, 1) + 0:+.1f}",
            _added(formula(row)),
        ]
    none = "" if line.key.method == "vanilla" else "–"
    if ours is None:
        return ["", label, *printed, "–", "–", none, "–"]
    values = list(scores(ours).values())
    parted = bool(row) and isinstance((row or {}).get("added_params"), dict)
    return [
        "",
        label,
        *printed,
        measured_added(ours.records[0], parted=parted),
        points(values, sign=False) or "–",
        points(line.less_vanilla) or none,
        str(len(ours.records)),
    ]


def points(values: list[float], *, sign: bool = True) -> str:
    """`+0.3 ± 0.1`, of values in points; one decimal more for differences below one."""
    if not values:
        return ""
    middle, noise = mean(values), spread(values)
    digits = 2 if sign else 1
    text = f"{middle:+.{digits}f}" if sign else f"{middle:.{digits}f}"
    return text if math.isnan(noise) else f"{text} ± {noise:.{digits}f}"


def measured_added(record: dict[str, Any], *, parted: bool) -> str:
    """Parameters over the dense model; the universal FFNs apart where the paper prints them apart."""
    if parted:
        return f"{record['added_params_universal']:,} + {record['added_params_paper']:,}"
    return f"{record['added_params']:,}"


def _added(added: Added | None) -> str:
    if added is None:
        return ""
    return added if isinstance(added, str) else " + ".join(added.values())


def _references(lines: list[Line]) -> list[list[str]]:
    """The dense parent and the prior, of a model's records."""
    records = [record for line in lines if line.ours for record in line.ours.records]
    found = []
    for label, kind in _REFERENCES.items():
        value = next((v for record in records if (v := reference(record["metrics"], kind)) is not None), None)
        if value is not None:
            found.append(["", f"*{label}*", *[""] * 5, f"{value:.1f}", "", ""])
    return found


def reference(metrics: dict[str, Any], kind: str) -> float | None:
    """What needs no experts: the dense `parent` before the last stage, or the question-only `prior`; in percent."""
    names = ("parent/score", "parent/accuracy") if kind == "parent" else ("test/prior",)
    return next((100 * metrics[name]["value"] for name in names if name in metrics), None)


def cost_table(lines: list[Line]) -> list[list[str]]:
    """Sizes and memory: as printed, and as our runs counted and measured them."""
    header = ["", "", "printed: size", "training", "inference", "ours: parameters", "stored", "peak memory"]
    table = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for line in lines:
        cost = (line.printed or {}).get("cost", {})
        mine = ["–"] * 3
        if line.ours:
            first = line.ours.records[0]
            peaks = [record["peak_gib"] for record in line.ours.records]
            mine = [f"{first['total_params']:,}", mib(first["stored_bytes"]), f"{mean(peaks):.2f} GiB"]
        label = line.key.label if line.printed else f"*{_CONTROLS.get(line.key.label, line.key.label)}*"
        table.append([NAMES.get(line.key.model or "", ""), label, *(cost.get(k, "") for k in _COSTS), *mine])
    return table


_COSTS = ("model_size", "training_memory", "inference_memory")
_COST_NOTE = (
    "Peak memory is that of the training process, read right after the fit: on an accelerator what was allocated "
    "there, on a CPU the resident size of the whole process, libraries included. Inference memory is not measured."
)
_COMPRESSED_NOTE = (
    "Ours counts routers and the biases of the experts among the added parameters of sparsify and quantize rows; the "
    "paper's tables of compression count the deltas alone."
)


def as_data(line: Line, formula: Formula) -> dict[str, Any]:
    """A line as plain data; scores in percent by seed, differences in points, None for what there is none of."""
    row, ours = line.printed, line.ours
    return {
        **vars(line.key),
        "table": line.table,
        "printed": row and {"added": row["added_params"], "score": printed_score(row)},
        "printed_less_vanilla": line.printed_less_vanilla,
        "formula": row and formula(row),
        "ours": ours and {"added": ours.records[0]["added_params"], "scores": scores(ours)},
        "less_vanilla": line.less_vanilla,
    }
