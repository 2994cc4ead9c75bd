"""What can be wrong with data, and how it is told."""

import dataclasses
from collections.abc import Sequence

_SHOWN = 10


class DataError(ValueError):
    """A data set that cannot be trained on; the message lists what is wrong with which rows."""


class RowError(ValueError):
    """One thing that makes a row unusable.

    Attributes:
        kind: groups alike faults, written `like_this`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class FaultyRow:
    """A row that cannot be used: its place in the file, its id, and what is wrong with it."""

    index: int
    id: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"row {self.index} ({self.id}): {self.message}"


def listed(faulty: Sequence[FaultyRow]) -> str:
    """The first rows, one a line, and how many more there are."""
    more = f"\n  … and {len(faulty) - _SHOWN} more" if len(faulty) > _SHOWN else ""
    return "".join(f"\n  {row}" for row in faulty[:_SHOWN]) + more


def next_step(on_fault: str) -> str:
    """What to do about rows for which a file was refused, where `on_fault` was this."""
    skip = "" if on_fault == "skip" else "; the data's on_fault=skip leaves such rows out"
    return f"python scripts/data.py action=check counts every fault of the data{skip}"
