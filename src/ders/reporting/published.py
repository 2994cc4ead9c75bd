"""The paper's printed numbers of added parameters against the rule that gives them (arXiv 2503.01359).

A row is one line of a table in `published.yaml`; a cell is one printed number of it.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import yaml

from ders.accounting import formula
from ders.accounting.formula import Added, Architecture

_UNITS = {"B": 10**9, "M": 10**6}
_DIALS = {"ders_sm": "sparsity", "sparsify": "sparsity", "ders_lm": "rank", "quantize": "bits"}
# What names a row within its table.
_KEYS = ("model", "method", "sparsity", "rank", "bits", "extended", "frozen_base")


@dataclass(frozen=True)
class Cell:
    """One printed number of added parameters.

    Attributes:
        part: `total`, `universal` or `experts`.
        text: as printed.
    """

    table: str
    row: Mapping[str, Any]
    part: str
    text: str

    @property
    def field(self) -> str:
        """As `misprints` names it."""
        return "added_params" if self.part == "total" else f"added_params.{self.part}"

    @property
    def names(self) -> dict[str, Any]:
        """What tells it from every other cell: table, model, method, dials, field."""
        own = {key: self.row[key] for key in _KEYS if self.row.get(key) is not None}
        return {"table": self.table, **own, "field": self.field}

    def __str__(self) -> str:
        return " ".join(
            str(value) if key in ("table", "model", "method") else f"{key}={value}" for key, value in self.names.items()
        )


@dataclass(frozen=True)
class Disagreement:
    """A cell that the rule does not give. `str()` names the cell, both numbers and the formula."""

    cell: Cell
    computed: int
    formula: str

    def __str__(self) -> str:
        ours = as_printed(self.computed, like=self.cell.text)
        return f"{self.cell}: printed {self.cell.text}, computed {ours} ({self.computed:,}) by {self.formula}"


@functools.cache
def load_published() -> dict[str, Any]:
    """`published.yaml`: tables, benchmarks, misprints."""
    data: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
    return data


def printed(row: Mapping[str, Any]) -> dict[str, str | None]:
    """What a row prints as added parameters: the total, or universal FFNs and experts apart; None where nothing."""
    found = row.get("added_params")
    parts = found if isinstance(found, Mapping) else {"total": found}
    return {part: parts.get(part) for part in ("universal", "experts", "total")}


def computed_added(row: Mapping[str, Any], architecture: Architecture) -> dict[str, int | None]:
    """The same by the rule; the parts are None where no universal FFN is apart: there is none, or it is a delta."""
    added = _rule(row)(architecture)
    parts = (added.universal, added.experts) if added.universal else (None, None)
    return dict(zip(("universal", "experts", "total"), (*parts, added.total), strict=True))


def as_printed(count: int, like: str) -> str:
    """A count as the paper would print it: with the unit and as many digits as `like` has ("1.24B"), rounded."""
    digits, unit = like[:-1], like[-1]
    value = (Decimal(count) / _UNITS[unit]).quantize(Decimal(digits), ROUND_HALF_UP)
    return f"{value}{unit}"


def cells() -> Iterator[Cell]:
    """All printed numbers of added parameters."""
    for table, content in load_published()["tables"].items():
        for row in content["rows"]:
            for part, text in printed(row).items():
                if text is not None:
                    yield Cell(table, row, part, text)


def disagreements(architectures: Mapping[str, Architecture]) -> list[Disagreement]:
    """The cells that the rule does not give, to the digits printed; misprints are not left out.

    Args:
        architectures: by model name; those of all rows.
    """
    found = []
    for cell in cells():
        computed = computed_added(cell.row, architectures[cell.row["model"]])[cell.part]
        if computed is None:
            raise ValueError(f"{cell}: its universal FFN is printed apart, and this architecture has none")
        if as_printed(computed, like=cell.text) != cell.text:
            found.append(Disagreement(cell, computed, describe(cell.row)))
    return found


def misprinted() -> list[Cell]:
    """The cells of added parameters that `misprints` lists.

    Raises:
        ValueError: an entry names no cell, or several.
    """
    known = list(cells())
    found = []
    for misprint in load_published()["misprints"]:
        for entry in misprint["cells"]:
            if entry["field"].startswith("added_params"):
                named = [cell for cell in known if entry.items() <= cell.names.items()]
                if len(named) != 1:
                    raise ValueError(f"misprint {misprint['id']}: {entry} names {len(named)} cells")
                found += named
    return found


def describe(row: Mapping[str, Any]) -> str:
    """The formula a row is computed by, with its dials."""
    dial = _DIALS.get(row["method"])
    dials = [] if dial is None else [f"{dial}={row[dial]}"]
    return f"{row['method']}({', '.join([*dials, *(['extended'] if row.get('extended') else [])])})"


def _rule(row: Mapping[str, Any]) -> Any:
    dial = _DIALS.get(row["method"])
    if dial is None:
        return formula.vanilla
    rule = getattr(formula, row["method"])
    return functools.partial(_apply, rule, row[dial], bool(row.get("extended")))


def _apply(rule: Any, dial: float, extended: bool, architecture: Architecture) -> Added:
    added: Added = rule(architecture, dial, extended=extended)
    return added
