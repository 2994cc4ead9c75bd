"""The paper's rows and ours: which belong together, and what each says. Scores in percent, differences in points."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from ders.reporting.tables import Row, name_of

# One row of a published table: `ders.reporting.published.yaml` says what its keys mean.
Printed = dict[str, Any]
# `tables`, `benchmarks` and `misprints` of that file.
Published = dict[str, Any]

NAMES = {
    "moe_llava_stablelm": "MoE-LLaVA-StableLM",
    "moe_llava_qwen": "MoE-LLaVA-Qwen",
    "moe_llava_phi": "MoE-LLaVA-Phi",
    "med_moe_stablelm": "Med-MoE-StableLM",
    "med_moe_phi": "Med-MoE-Phi",
    "coder_moe": "Coder-MoE",
}
DIALS = {"ders_sm": "sparsity", "sparsify": "sparsity", "ders_lm": "rank", "svd": "rank", "quantize": "bits"}


@dataclass(frozen=True)
class Key:
    """What a printed row and a row of ours agree in where they are the same experiment."""

    model: str | None
    method: str
    dial: float | None = None
    extended: bool = False
    frozen_base: bool = False

    @property
    def label(self) -> str:
        words = [self.method, *([f"{DIALS[self.method]} {self.dial:g}"] if self.dial is not None else [])]
        return " ".join(
            [*words, *(["extended"] if self.extended else []), *(["frozen base"] if self.frozen_base else [])]
        )


def printed_key(row: Printed) -> Key:
    method = row["method"]
    dial = row[DIALS[method]] if method in DIALS else None
    return Key(row["model"], method, dial, row.get("extended", False), row.get("frozen_base", False))


def measured_key(row: Row) -> Key:
    first = row.records[0]
    config, method = first["config"], name_of(first)
    dial = config.get(DIALS[method]) if method in DIALS else None
    extended = method not in ("dense", "vanilla") and bool(config.get("extended"))
    return Key(config.get("model", {}).get("name"), method, dial, extended, config.get("trainable") == "frozen_shared")


def by_key(rows: Iterable[Row]) -> dict[Key, Row]:
    """Rows by what they are; the first of several that differ in nothing that the paper's tables name."""
    found: dict[Key, Row] = {}
    for row in rows:
        found.setdefault(measured_key(row), row)
    return found


def scores(row: Row) -> dict[int, float]:
    """Score by seed: `test/score`, or where a task has none the accuracy."""
    found = {}
    for record in row.records:
        metric = record["metrics"].get("test/score") or record["metrics"].get("test/accuracy")
        if metric:
            found[record["seed"]] = 100 * metric["value"]
    return found


def one_question(row: Row) -> float:
    """What one question of the test is worth; NaN where nothing was scored."""
    metrics = [record["metrics"] for record in row.records]
    counts = [m["count"] for found in metrics if (m := found.get("test/score") or found.get("test/accuracy"))]
    return 100 / counts[0] if counts else math.nan


def by_seed(row: Row, other: Row) -> dict[int, float]:
    """Differences of scores by seed, over the seeds that both have: what two runs of a seed share cancels."""
    a, b = scores(row), scores(other)
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def paired(row: Row, other: Row) -> list[float]:
    """`by_seed` without the seeds."""
    return list(by_seed(row, other).values())


def printed_score(row: Printed) -> float:
    """The overall score, or where none is printed the plain mean of the benchmarks."""
    overall: float | None = row["scores"].get("overall")
    return overall if overall is not None else mean(row["scores"].values())


def printed_vanilla(table: str, row: Printed, published: Published) -> Printed | None:
    """The vanilla row that a printed row is compared with: its own table's, else one over the same benchmarks."""
    tables = published["tables"]
    for name in [table, *tables]:
        for other in tables[name]["rows"]:
            alike = name == table or other["scores"].keys() == row["scores"].keys()
            if other["model"] == row["model"] and other["method"] == "vanilla" and alike:
                return dict(other)
    return None


@dataclass(frozen=True)
class Line:
    """A row of the paper beside ours.

    Attributes:
        printed: the row as printed; None for a control of ours that the paper lacks.
        printed_less_vanilla: difference of the printed scores; None for vanilla itself and where none is printed.
        ours: None where it was not run.
        less_vanilla: of our scores, seed by seed; empty for vanilla itself and where one of the two was not run.
    """

    key: Key
    table: str | None
    printed: Printed | None
    printed_less_vanilla: float | None
    ours: Row | None
    less_vanilla: list[float] = field(default_factory=list)


def lines_of(names: list[str], published: Published, rows: list[Row]) -> list[Line]:
    """Lines of published tables, model by model: the printed rows, then our rows that these tables lack."""
    ours = by_key(rows)
    printed = [(table, row) for table in names for row in published["tables"][table]["rows"]]
    lines = []
    for model in dict.fromkeys(row["model"] for _, row in printed):
        vanilla = ours.get(Key(model, "vanilla"))
        shown = {printed_key(row): (table, row) for table, row in printed if row["model"] == model}
        controls = {key: (None, None) for key in ours if key.model == model and key not in shown}
        for key, (table, row) in [*shown.items(), *controls.items()]:
            mine = ours.get(key)
            against = printed_vanilla(table, row, published) if table and row and key.method != "vanilla" else None
            less = round(printed_score(row) - printed_score(against), 6) if row and against else None
            differences = paired(mine, vanilla) if mine and vanilla and mine is not vanilla else []
            lines.append(Line(key, table, row, less, mine, differences))
    return lines
