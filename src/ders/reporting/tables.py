"""From records to tables: rows that differ only in their seed become one, with mean and spread."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from ders.reporting.identity import digest, identity
from ders.reporting.record import Record


@dataclass(frozen=True)
class Row:
    """One configuration of a claim, over its seeds.

    Attributes:
        method, dials: what the row is, a compression by its own name; dials are root-level keys in which the claim's
            rows differ.
        records: one per seed.
    """

    method: str
    dials: dict[str, Any]
    records: tuple[Record, ...]

    @property
    def label(self) -> str:
        return " ".join([self.method, *(f"{key} {value}" for key, value in self.dials.items() if value is not None)])

    def scores(self, metric: str) -> list[float]:
        return [r["metrics"][metric]["value"] for r in self.records if metric in r["metrics"]]

    def mean(self, metric: str) -> float:
        scores = self.scores(metric)
        return sum(scores) / len(scores) if scores else math.nan

    def spread(self, metric: str) -> float:
        """Sample standard deviation over seeds; NaN for fewer than two."""
        return spread(self.scores(metric))


def spread(values: list[float]) -> float:
    """Sample standard deviation; NaN for fewer than two."""
    return stdev(values) if len(values) > 1 else math.nan


def difference(values: list[float], digits: int) -> str:
    """`-0.24 ± 0.38`; a single seed has no spread, and nothing compared is nothing said."""
    if not values:
        return ""
    return f"{mean(values):+.{digits}f}" + (f" ± {spread(values):.{digits}f}" if len(values) > 1 else "")


def has_control(rows: list[Row]) -> bool:
    """Whether one dense control is among several rows; of two none would be the control of all."""
    return len(rows) > 1 and sum(row.method == "dense" for row in rows) == 1


def less_dense(rows: list[Row], metric: str) -> list[list[float]]:
    """Of every row, the scores less the dense control's of the same seed, so that what the seeds differ in cancels.

    Seeds that the control lacks are left out.
    """
    (control,) = (row for row in rows if row.method == "dense")
    before = {record["seed"]: record["metrics"][metric]["value"] for record in control.records}
    return [
        [r["metrics"][metric]["value"] - before[r["seed"]] for r in row.records if r["seed"] in before] for row in rows
    ]


def rows_of(records: list[Record]) -> list[Row]:
    """Group records by everything but the seed, in the order they come."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[digest({**identity(record["config"]), "seed": None})].append(record)
    dials = [_dials(identity(group[0]["config"])) for group in groups.values()]
    # Only what tells rows of one method apart is worth a word.
    varying = {
        (method, key)
        for method, values in _by_method(groups, dials).items()
        for key in {k for v in values for k in v}
        if len({json.dumps(v.get(key)) for v in values}) > 1 or key in ("sparsity", "rank")
    }
    return [
        Row(
            name_of(group[0]),
            {key: value for key, value in dial.items() if (name_of(group[0]), key) in varying},
            tuple(sorted(group, key=lambda record: record["seed"])),
        )
        for group, dial in zip(groups.values(), dials, strict=True)
    ]


def name_of(record: Record) -> str:
    """The compression's name where there is one, else the method's."""
    name: str = (record["config"].get("compression") or {}).get("name") or record["method"]
    return name


def _by_method(groups: dict[str, list[Record]], dials: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for group, dial in zip(groups.values(), dials, strict=True):
        found[name_of(group[0])].append(dial)
    return found


def _dials(config: dict[str, Any]) -> dict[str, Any]:
    hidden = ("seed", "parent_seed", "parent", "scale")
    return {k: v for k, v in config.items() if not isinstance(v, dict | list) and k not in hidden}


def kinds_of(records: list[Record]) -> list[str]:
    """Question kinds that any record has a score for."""
    prefix = "test/accuracy/"
    return sorted({key.removeprefix(prefix) for r in records for key in r["metrics"] if key.startswith(prefix)})


def percent(mean: float, spread: float = math.nan) -> str:
    """`71.2 ± 0.4`, of fractions."""
    if math.isnan(mean):
        return "–"
    return f"{100 * mean:.1f}" if math.isnan(spread) else f"{100 * mean:.1f} ± {100 * spread:.1f}"


def nats(mean: float, spread: float = math.nan) -> str:
    """`1.2345 ± 0.0004`, of losses."""
    if math.isnan(mean):
        return "–"
    return f"{mean:.4f}" if math.isnan(spread) else f"{mean:.4f} ± {spread:.4f}"


@dataclass(frozen=True)
class Score:
    """What runs are compared by in figures.

    Attributes:
        metric: of the test split, by its name in records.
        factor: from the record's unit to the one shown.
        axis: name of an axis of such scores.
        gain: name of an axis of differences to the vanilla run; upwards is better.
        sign: −1 where less is better.
        fine: differences up to here are what one wants to see, and not less, in the unit shown.
    """

    metric: str
    factor: float
    axis: str
    gain: str
    sign: int
    fine: float


_ACCURACY = Score("accuracy", 100, "test accuracy, %", "test accuracy less vanilla, points", 1, 1.0)
_LOSS = Score("loss", 1, "test loss, nats a token", "vanilla's test loss less this one, nats", -1, 0.01)


def score_of(records: list[Record]) -> Score:
    """The score that says most: the loss, where there is one."""
    return _LOSS if scored_by_likelihood(records) else _ACCURACY


def scored_by_likelihood(records: list[Record]) -> bool:
    """Whether scores are of tokens that the model was to foretell, instead of answers it gave."""
    return any("test/loss" in record["metrics"] for record in records)


def pipes(lines: list[list[str]]) -> str:
    """Lines of cells as a Markdown table; the second line is its rule."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def markdown(rows: list[Row], title: str, command: str) -> str:
    """The table of a claim, with the dense parent and the question-only prior beside the scores.

    Where the dense control is among the rows, the score that says most stands also less the control's, seed by seed.
    """
    records = [record for row in rows for record in row.records]
    kinds = kinds_of(records)
    loss = ["loss"] if scored_by_likelihood(records) else []
    header = ["", "added parameters", "trainable", "stored", *loss, "accuracy", *kinds, "seeds"]
    score = score_of(records)
    beside = less_dense(rows, f"test/{score.metric}") if has_control(rows) else []
    compared = header.index(score.metric) + 1
    if beside:
        header.insert(compared, "less dense" if loss else "less dense, points")
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for number, row in enumerate(rows):
        first = row.records[0]
        lines.append(
            [
                row.label,
                f"{first['added_params']:,}",
                f"{first['trainable_params']:,}",
                mib(first["stored_bytes"]),
                *(nats(row.mean("test/loss"), row.spread("test/loss")) for _ in loss),
                percent(row.mean("test/accuracy"), row.spread("test/accuracy")),
                *(percent(row.mean(f"test/accuracy/{kind}"), row.spread(f"test/accuracy/{kind}")) for kind in kinds),
                str(len(row.records)),
            ]
        )
        if beside:
            values = [] if row.method == "dense" else [score.factor * value for value in beside[number]]
            lines[-1].insert(compared, difference(values, 4 if loss else 2))
    for label, metric in [
        ("dense parent, before this stage", "parent/accuracy"),
        ("question-only prior", "test/prior"),
    ]:
        values = [record["metrics"][metric]["value"] for record in records if metric in record["metrics"]]
        if values:
            by_kind = [
                percent(records[0]["metrics"].get(f"{metric}/{kind}", {}).get("value", math.nan)) for kind in kinds
            ]
            before = records[0]["metrics"].get(metric.replace("accuracy", "loss"), {}).get("value", math.nan)
            told = [nats(before if metric == "parent/accuracy" else math.nan) for _ in loss]
            # Parents that were trained on other machines can differ, and then so do the rows for that alone.
            others = f"; {len(set(values))} different ones, here the first" if len(set(values)) > 1 else ""
            lines.append([f"*{label}{others}*", "", "", "", *told, percent(values[0]), *by_kind, ""])
            if beside:
                lines[-1].insert(compared, "")
    return f"{caption(records, title, command)}\n\n{pipes(lines)}\n"


def caption(records: list[Record], title: str, command: str) -> str:
    """What a table shows, over how many questions, and how to make it again."""
    counts = {record["metrics"]["test/accuracy"]["count"] for record in records if "test/accuracy" in record["metrics"]}
    commits = sorted({record["commit"][:10] for record in records})
    number = " or ".join(map(str, sorted(counts)))
    what = (
        f"Loss of an answer's token in nats, and how many of these tokens are thought likeliest, in percent ({number} "
        "tokens; the prior knows the token before)"
        if scored_by_likelihood(records)
        else f"Test accuracy in percent (exact match, {number} questions)"
    )
    return f"**{title}.** {what}, mean ± standard deviation over seeds.\n`{command}`, commit {', '.join(commits)}."
