"""Goals on hand-made rows."""

from typing import Any

import pytest

from ders.evaluation.goals import (
    BIG,
    BOTH,
    DECODE,
    FORWARD,
    LAYER,
    SMALL,
    error_goals,
    memory_goals,
    state_goals,
    time_goals,
)
from ders.evaluation.layers import LM, SM, SPARSE, TWO_BITS


def row(method: str, tokens: int, ratios: dict[str, float], **changes: Any) -> dict[str, Any]:
    cell = {"shape": BIG.name, "experts": 4, "top_k": 2, "direction": FORWARD}
    return {
        **cell, "method": method, "tokens": tokens, **{k: {"median": v} for k, v in ratios.items()}, **changes
    }  # fmt: skip


def test_met_and_missed() -> None:
    rows = [row(SM, 256, {"to_dense": 1.11, "to_vanilla": 0.5, "to_rebuilt": 0.6})]
    assert time_goals(LAYER, rows, "cpu") == [
        {"goal": "SM 0.9999, 2048×5632 SwiGLU, T 256, forward: time over dense", "figure": 1.11, "limit": 1.1,
         "met": False},
        {"goal": "SM 0.9999, 2048×5632 SwiGLU, T 256, forward: time over the best vanilla", "figure": 0.5,
         "limit": 0.5, "met": True},
        {"goal": "SM 0.9999, 2048×5632 SwiGLU, T 256, forward: time over rebuilding W_e", "figure": 0.6,
         "limit": 0.5, "met": False},
    ]  # fmt: skip


ALL = {"to_dense": 1.0, "to_vanilla": 1.0, "to_rebuilt": 1.0}


@pytest.mark.parametrize(
    ("targets", "given", "device", "limits"),
    [
        (LAYER, row(LM, 256, ALL), "cpu", [1.1, 0.5, 0.5]),
        (LAYER, row(LM, 2048, ALL), "cuda", [1.1, 0.55]),
        (LAYER, row(LM, 256, ALL, direction=BOTH), "cpu", [1.15, 0.5]),
        (LAYER, row(LM, 256, ALL, direction=BOTH), "cuda", [1.15, 0.55]),
        (LAYER, row(LM, 2048, ALL, shape=SMALL.name), "cpu", [1.25]),
        (LAYER, row(LM, 2048, ALL, shape=SMALL.name, direction=BOTH), "cpu", [1.2]),
        (LAYER, row(LM, 2048, ALL, shape=SMALL.name), "cuda", [1.2]),
        (LAYER, row(SPARSE, 256, ALL), "cpu", [1.1]),
        (LAYER, row(TWO_BITS, 256, ALL), "cuda", [1.1]),
        (LAYER, row(LM, 16, ALL), "cpu", []),  # told by the other suite
        (LAYER, row(LM, 256, ALL, shape=SMALL.name), "cpu", []),
        (LAYER, row(LM, 256, ALL, experts=8), "cuda", []),
        (LAYER, row(LM, 256, ALL, top_k=1), "cuda", []),
        (LAYER, row("vanilla: ours", 256, ALL), "cpu", []),
        (DECODE, row(SM, 1, ALL), "cpu", [1.1, 0.1]),
        (DECODE, row(SM, 16, ALL), "cpu", [1.1, 0.35, 0.1]),
        (DECODE, row(SM, 16, ALL), "cuda", [1.2, 0.35, 0.1]),
        (DECODE, row(SM, 128, ALL), "cuda", [0.35]),
        (DECODE, row(SPARSE, 1, ALL), "cpu", [0.8]),
        (DECODE, row(SPARSE, 16, ALL), "cpu", [0.55]),
        (DECODE, row(SPARSE, 1, ALL), "cuda", [0.75]),
        (DECODE, row(SPARSE, 16, ALL), "cuda", [0.5]),
        (DECODE, row(TWO_BITS, 1, ALL), "cpu", [0.85]),
        (DECODE, row(TWO_BITS, 16, ALL), "cpu", [0.75]),
        (DECODE, row(TWO_BITS, 1, ALL), "cuda", [0.7]),
        (DECODE, row(TWO_BITS, 16, ALL), "cuda", [0.45]),
    ],
)
def test_the_table_of_goals(targets: Any, given: dict[str, Any], device: str, limits: list[float]) -> None:
    assert [goal["limit"] for goal in time_goals(targets, [given], device)] == limits


def test_what_was_not_measured_does_not_appear() -> None:
    assert time_goals(LAYER, [], "cpu") == error_goals([]) == memory_goals([]) == state_goals([]) == []


def test_errors() -> None:
    def error(method: str, dtype: str, error: float, tokens: int = 16) -> dict[str, Any]:
        return row(method, tokens, {}, dtype=dtype, error=error)

    goals = error_goals(
        [
            error("dense", "float32", 3e-7),
            error(SM, "float32", 4e-7),
            error(SM, "float32", 2e-6, tokens=1),
            error("dense", "bfloat16", 4e-3),
            error("dense", "bfloat16", 2e-3, tokens=1),
            error(SM, "bfloat16", 5e-3),
            error(SM, "bfloat16", 2.5e-3, tokens=1),
            error(LM, "bfloat16", 7e-3),
        ]
    )
    assert [(goal["figure"], goal["limit"], goal["met"]) for goal in goals] == [
        (2e-6, 1e-6, False),  # the worst cell counts
        (1.25, 1.5, True),
        (1.75, 1.5, False),
    ]
    assert [goal["goal"].split(":")[0] for goal in goals] == [SM, SM, LM]


def test_memory() -> None:
    def memory(method: str, peak: int | None, saved: float) -> dict[str, Any]:
        ratio = None if peak is None else 1.2
        return row(method, 1024, {}, peak_bytes=peak, peak_bytes_to_dense=ratio, saved_bytes_to_dense=saved)

    peak, saved = memory_goals([memory(SM, 5, 1.0), memory(LM, None, 1.1), memory("dense", 4, 1.0)])
    assert (peak["figure"], peak["met"]) == (1.2, False)
    assert "peak of activation memory" in peak["goal"]
    assert (saved["figure"], saved["met"]) == (1.1, True)
    assert "memory kept for backward" in saved["goal"]


def test_training_state() -> None:
    rows = [{"model": "m", "method": method, "state_to_dense": ratio} for method, ratio in [(SM, 1.001), (SPARSE, 1.3)]]
    assert state_goals(rows) == [
        {"goal": "SM 0.9999, m: training state over dense", "figure": 1.001, "limit": 1.02, "met": True}
    ]
