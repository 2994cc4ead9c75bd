"""Single comparisons behind a claim: two rows of the paper, and the same two of ours, with what is noise."""

import math
from dataclasses import dataclass
from typing import Any

from ders.reporting.paper import (
    NAMES,
    Key,
    Printed,
    Published,
    by_seed,
    one_question,
    paired,
    printed_key,
    printed_score,
    printed_vanilla,
)
from ders.reporting.tables import Row

_FACTORS = {"B": 1e9, "M": 1e6, "G": 1e9}
# Fields of a record by the quantity; what is printed and not here, our runs do not measure.
_MEASURED = {"model_size": "total_params", "training_memory": "peak_gib", "layer_size": "added_params_paper"}
_COUNTED = ("model_size", "layer_size")
# Points by which two single runs of one configuration may differ: the paper repeats none, so this is ours.
SINGLE_RUN = 1.0


@dataclass(frozen=True)
class Comparison:
    """A row against another: `expect` and `margin` as in claims.yaml.

    Attributes:
        printed: difference of the printed values, None where the paper prints none; of a quantity, percent saved.
        printed_noise: how far the printed difference may be off. Where a row is to be better or worse, what single
            runs differ by; where it may lose up to the margin, which allows for that, one question and the rounding.
        ours: our differences, one per seed; empty where one of the rows was not run or has no score.
        question: what one question of our test is worth.
    """

    what: str
    expect: str
    margin: float
    quantity: str | None
    printed: float | None
    printed_noise: float
    ours: list[float]
    question: float

    @property
    def exact(self) -> bool:
        """Counted, not measured: the same for every seed."""
        return self.quantity in _COUNTED

    @property
    def measurable(self) -> bool:
        """Whether records of ours can say anything on it."""
        return self.quantity is None or self.quantity in _MEASURED


def comparisons_of(claim: dict[str, Any], published: Published, ours: dict[Key, Row]) -> list[Comparison]:
    """Every comparison of a claim, model by model."""
    rows = [(table, row) for table in claim["tables"] for row in published["tables"][table]["rows"]]
    found = []
    for spec in claim.get("compare", []):
        against = spec.get("against", {"method": "vanilla"})
        for table, row in _matching(rows, spec["row"]):
            same_model = {} if "model" in against else {"model": row["model"]}
            other = next(iter(_matching(rows, {**against, **same_model})), None)
            if other is not None:
                found.append(_compare(spec, (table, row), other, published, ours))
    return found


def _matching(rows: list[tuple[str, Printed]], selector: dict[str, Any]) -> list[tuple[str, Printed]]:
    """One row per experiment, though several tables print it."""
    found = {}
    for table, row in rows:
        described = {"frozen_base": False, "extended": False, **row}
        if all(described.get(key) == value for key, value in selector.items()):
            found.setdefault(printed_key(row), (table, row))
    return list(found.values())


def _compare(
    spec: dict[str, Any],
    row: tuple[str, Printed],
    other: tuple[str, Printed],
    published: Published,
    ours: dict[Key, Row],
) -> Comparison:
    a, b = printed_key(row[1]), printed_key(other[1])
    quantity = spec.get("quantity")
    what = f"{NAMES[a.model or '']} {a.label} against {b.label}"
    mine, its = ours.get(a), ours.get(b)
    if quantity:
        what = f"{quantity.replace('_', ' ')} of {what}"
        printed = _saved(quantity, _printed_quantity(quantity, row[1]), _printed_quantity(quantity, other[1]))
        values = _quantities_saved(quantity, mine, its) if mine and its else []
        return Comparison(what, spec["expect"], spec["margin"], quantity, printed, 0.0, values, 0.0)
    printed = printed_score(row[1]) - printed_score(other[1])
    grain = max(_grain(row[1], published), _grain(other[1], published))
    noise = grain if spec["expect"] == "not_worse" else max(grain, SINGLE_RUN)
    differences = paired(mine, its) if mine and its else []
    if spec.get("drop"):
        what = f"{what.split(' against')[0]} against {NAMES[b.model or '']}, each less its own vanilla"
        own, others = (printed_vanilla(*pair, published) for pair in (row, other))
        printed -= (printed_score(own) if own else math.nan) - (printed_score(others) if others else math.nan)
        differences = _drops(mine, its, ours.get(Key(a.model, "vanilla")), ours.get(Key(b.model, "vanilla")))
    question = max(one_question(mine), one_question(its)) if mine and its else math.nan
    return Comparison(what, spec["expect"], spec["margin"], None, printed, noise, differences, question)


def _drops(mine: Row | None, its: Row | None, vanilla: Row | None, others: Row | None) -> list[float]:
    if not (mine and its and vanilla and others):
        return []
    a, b = by_seed(mine, vanilla), by_seed(its, others)
    return [a[seed] - b[seed] for seed in a if seed in b]


def _grain(row: Printed, published: Published) -> float:
    """One question of the benchmark where it weighs most in the mean, as far as the counts are known, and at least
    the rounding of two printed scores."""
    counts = [published["benchmarks"][name]["questions"] for name in row["scores"] if name != "overall"]
    return max([0.1, *(100 / count / len(counts) for count in counts if count)])


def _printed_quantity(quantity: str, row: Printed) -> float | None:
    if quantity == "layer_size":
        added = row["added_params"]
        return _number(added["experts"] if isinstance(added, dict) else added)
    return _number(row["cost"][quantity])


def _number(text: str) -> float:
    return float(text[:-1]) * _FACTORS[text[-1]]


def _saved(quantity: str, value: float | None, against: float | None, num_experts: int = 4) -> float | None:
    """Percent by which a value is below the one of vanilla."""
    if value is None or against is None:
        return None
    if quantity == "layer_size":  # what is added lies over one FFN; vanilla adds all copies but one
        ffn = against / (num_experts - 1)
        value, against = value + ffn, against + ffn
    return 100 * (1 - value / against)


def _quantities_saved(quantity: str, mine: Row, its: Row) -> list[float]:
    """Seed by seed; empty for what runs do not measure."""
    if quantity not in _MEASURED:
        return []
    name = _MEASURED[quantity]
    others = {record["seed"]: record for record in its.records}
    saved = []
    for record in mine.records:
        if record["seed"] in others:
            other = others[record["seed"]]
            saved.append(_saved(quantity, record[name], other[name], other["config"].get("num_experts", 4)))
    return [value for value in saved if value is not None]
