"""What the project set out to reach in speed and memory, and which of it a measurement reaches.

Goals are ratios of one run, so that they hold on any machine of a kind; a goal without a measured row does not appear.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ders.evaluation.layers import LM, SM, SPARSE, THICK, THIN, TWO_BITS, Mixture, Shape

BIG, SMALL = Shape(2048, 5632), Shape(576, 1536)
FORWARD, BOTH = "forward", "forward + backward"

MAX_ERROR_FLOAT32 = 1e-6
# Over the dense FFN's own error.
MAX_ERROR_BFLOAT16 = 1.5
MAX_ACTIVATION_RATIO = 1.1
MAX_STATE_RATIO = 1.02

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One line of the table of goals: for each of the methods, wherever the numbers of tokens fit.

    Attributes:
        measure: of a row: `to_dense`, `to_vanilla` (the fastest vanilla layer) or `to_rebuilt`.
        cpu, gpu: the most it may be on a CPU and on a GPU.
    """

    methods: tuple[str, ...]
    measure: str
    cpu: float
    gpu: float
    least_tokens: int
    most_tokens: float = math.inf
    shape: Shape = BIG
    direction: str = FORWARD

    def fits(self, row: Row) -> bool:
        return (
            row["method"] in self.methods
            and row["shape"] == self.shape.name
            and (row["experts"], row["top_k"]) == (Mixture().experts, Mixture().top_k)
            and row["direction"] == self.direction
            and self.least_tokens <= row["tokens"] <= self.most_tokens
        )


LAYER = (
    Target(THIN, "to_dense", 1.10, 1.10, 256),
    Target(THIN, "to_vanilla", 0.50, 0.55, 256),
    Target(THIN, "to_dense", 1.15, 1.15, 256, direction=BOTH),
    Target(THIN, "to_vanilla", 0.50, 0.55, 256, direction=BOTH),
    Target(THIN, "to_dense", 1.25, 1.2, 2048, 2048, SMALL),
    Target(THIN, "to_dense", 1.2, 1.2, 2048, 2048, SMALL, BOTH),
    Target(THICK, "to_vanilla", 1.1, 1.1, 256),
    Target(THIN, "to_rebuilt", 1 / 2, 1 / 2, 256, 256),
)
DECODE = (
    Target(THIN, "to_dense", 1.10, 1.2, 1, 1),
    Target(THIN, "to_dense", 1.10, 1.2, 16, 16),
    Target(THIN, "to_vanilla", 0.35, 0.35, 16, 128),
    Target((SPARSE,), "to_vanilla", 0.8, 0.75, 1, 1),
    Target((SPARSE,), "to_vanilla", 0.55, 0.5, 16, 16),
    Target((TWO_BITS,), "to_vanilla", 0.85, 0.7, 1, 1),
    Target((TWO_BITS,), "to_vanilla", 0.75, 0.45, 16, 16),
    Target(THIN, "to_rebuilt", 1 / 10, 1 / 10, 1, 16),
)
_MEASURES = {
    "to_dense": "time over dense",
    "to_vanilla": "time over the best vanilla",
    "to_rebuilt": "time over rebuilding W_e",
}


def goal(name: str, figure: float, limit: float) -> Row:
    return {"goal": name, "figure": figure, "limit": limit, "met": figure <= limit}


def time_goals(targets: Iterable[Target], rows: list[Row], device: str) -> list[Row]:
    """Of each target, one goal per measured row that it speaks of."""
    return [
        goal(
            f"{row['method']}, {row['shape']}, T {row['tokens']}, {row['direction']}: {_MEASURES[target.measure]}",
            row[target.measure]["median"],
            target.cpu if device == "cpu" else target.gpu,
        )
        for target in targets
        for method in target.methods
        for row in rows
        if row["method"] == method and target.fits(row)
    ]


def error_goals(errors: list[Row]) -> list[Row]:
    """The worst of each method over all cells: absolute in float32, over dense in the same cell in bfloat16.

    Args:
        errors: rows with `dtype`, `method` (`dense` among them), `error` and what names their cell.
    """
    own = {_cell(row): row["error"] for row in errors if row["method"] == "dense"}
    found = []
    for method in (SM, LM, SPARSE, TWO_BITS):
        mine = [row for row in errors if row["method"] == method]
        exact = [row["error"] for row in mine if row["dtype"] == "float32"]
        half = [row["error"] / own[_cell(row)] for row in mine if row["dtype"] == "bfloat16"]
        if exact:
            found.append(goal(f"{method}: relative error to float64, float32", max(exact), MAX_ERROR_FLOAT32))
        if half:
            found.append(goal(f"{method}: error over dense's, bfloat16", round(max(half), 4), MAX_ERROR_BFLOAT16))
    return found


def _cell(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("dtype", "shape", "experts", "top_k", "tokens", "direction"))


def memory_goals(rows: list[Row]) -> list[Row]:
    """The peak where the system tells it, else what is kept for the backward pass."""
    found = []
    for row in rows:
        if row["method"] in THIN:
            measured = "peak" if row["peak_bytes"] is not None else "saved"
            what = "peak of activation memory" if measured == "peak" else "memory kept for backward"
            name = f"{row['method']}, {row['shape']}, T {row['tokens']}: {what} over dense"
            found.append(goal(name, round(row[f"{measured}_bytes_to_dense"], 4), MAX_ACTIVATION_RATIO))
    return found


def state_goals(rows: list[Row]) -> list[Row]:
    """Weights, gradients and AdamW's states of whole models."""
    return [
        goal(f"{row['method']}, {row['model']}: training state over dense", row["state_to_dense"], MAX_STATE_RATIO)
        for row in rows
        if row["method"] in THIN
    ]
