"""Which printed cells contradict the paper's own arithmetic: counted, and told in footnotes."""

from collections.abc import Callable
from typing import Any

from ders.accounting.formula import Architecture
from ders.reporting.paper import Line, Printed, Published
from ders.reporting.published import as_printed, computed_added

# Added parameters as the paper's formula gives them, in the form the row prints them: text, or parts by name.
Added = str | dict[str, str]
Formula = Callable[[Printed], Added | None]


def computed(row: Printed, architecture: Architecture) -> Added:
    """What the paper's formula gives for a row, to the digits that the row prints; in total where it prints none."""
    counts = {part: count for part, count in computed_added(row, architecture).items() if count is not None}
    added = row["added_params"]
    if isinstance(added, dict):
        return {part: as_printed(counts[part], like=text) for part, text in added.items()}
    like = added or ("0.00B" if counts["total"] >= 10**9 else "0.00M")
    return as_printed(counts["total"], like=like)


def counted(lines: list[Line], published: Published, formula: Formula) -> str:
    """How many cells of added parameters the formula gives as printed, and how many others are listed as misprints."""
    good = listed = cells = 0
    for line in lines:
        if line.printed is None or line.printed["added_params"] is None or line.table is None:
            continue
        printed, given = parts_of(line.printed["added_params"]), parts_of(formula(line.printed))
        wrong = {cell for _, cell in misprints_of(line.table, line.printed, published)}
        for part, text in printed.items():
            cells += 1
            good += given.get(part) == text
            listed += given.get(part) != text and part in wrong
    if not cells:
        return "The paper prints no added parameters here."
    others = f", {cells - good - listed} unexplained" if good + listed < cells else ""
    return (
        f"Added parameters: {good} of {cells} cells as printed, {listed} misprint{'s' * (listed != 1)} listed{others}."
    )


def parts_of(added: Added | None) -> dict[str, str]:
    """The printed counts of a row, by the field that names them."""
    if added is None:
        return {}
    return {"added_params": added} if isinstance(added, str) else {f"added_params.{k}": v for k, v in added.items()}


def misprints_of(table: str, row: Printed, published: Published) -> list[tuple[dict[str, Any], str]]:
    """Misprints of a row, each with the field it is in."""
    values = {**parts_of(row["added_params"]), **{f"scores.{name}": v for name, v in row["scores"].items()}}
    described = {"frozen_base": False, **row, "table": table}
    found = []
    for misprint in published["misprints"]:
        for cell in misprint["cells"]:
            alike = all(described.get(key) == value for key, value in cell.items() if key != "field")
            if alike and values.get(cell["field"]) == misprint["printed"]:
                found.append((misprint, cell["field"]))
    return found


class Notes:
    """Footnotes of a table, numbered as they are first met."""

    def __init__(self, published: Published) -> None:
        self.published = published
        self.texts: dict[str, str] = {}

    def mark(self, table: str, row: Printed, group: str) -> str:
        """Marks of the misprinted cells in a group of fields."""
        met = {
            misprint["id"]: self._text(misprint, cell)
            for misprint, cell in misprints_of(table, row, self.published)
            if cell.split(".")[0] == group
        }
        self.texts |= {name: text for name, text in met.items() if name not in self.texts}
        numbers = ",".join(str(1 + list(self.texts).index(name)) for name in met)
        return f"<sup>{numbers}</sup>" if numbers else ""

    def _text(self, misprint: dict[str, Any], cell: str) -> str:
        group, _, name = cell.partition(".")
        what = self.published["benchmarks"][name]["name"] if group == "scores" else "added parameters"
        computed = f", computed {misprint['computed']}" if misprint["computed"] is not None else ""
        return f"{what}: printed {misprint['printed']}{computed}. {misprint['reason']}"
