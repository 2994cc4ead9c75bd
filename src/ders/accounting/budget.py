"""The mildest setting of a delta that fits into a number of bytes."""

import bisect
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ders.deltas import Delta

DIALS = ("sparsity", "bits", "rank")
_BITS = (8, 4, 3, 2, 1)
# Sparsities are told apart down to this fraction.
_STEPS = 10**6


def dial_of(delta: Callable[..., Delta]) -> str:
    """The dial by which a delta grows or shrinks.

    Raises:
        ValueError: it has none.
    """
    bound = getattr(delta, "keywords", {})
    for dial in DIALS:
        if dial in bound:
            return dial
    raise ValueError(f"a budget needs a delta with one of the dials {', '.join(DIALS)}: this one has none")


def settings(delta: functools.partial[Delta], matrices: Iterable[tuple[int, int]]) -> Sequence[Any]:
    """All settings of a delta's dial for FFN matrices (out, in), the mildest first."""
    shapes = list(matrices)
    dial = dial_of(delta)
    if dial == "bits":
        return (1,) if delta.keywords.get("scheme") == "sign" else _BITS
    if dial == "rank":
        return range(min(min(shape) for shape in shapes), 0, -1)
    smallest = min(rows * columns for rows, columns in shapes)
    highest = _STEPS - -(-_STEPS // smallest)  # one entry is kept
    return [step / _STEPS for step in range(highest + 1)]


def delta_bytes(
    delta: Callable[..., Delta], count: int, matrices: Iterable[tuple[int, int]], dtype: torch.dtype
) -> int:
    """Bytes of the stored tensors of `count` experts' deltas to the matrices of one FFN."""
    with torch.device("meta"):
        made = [delta(count, rows, columns).to(dtype) for rows, columns in matrices]
    return sum(one.storage_bits() for one in made) // 8


def mildest(
    delta: functools.partial[Delta],
    matrices: Iterable[tuple[int, int]],
    estimate: Callable[[Callable[..., Delta]], int],
    exact: Callable[[Callable[..., Delta]], int],
    budget: int,
) -> functools.partial[Delta]:
    """The delta with its dial at the mildest setting whose bytes fit.

    Args:
        delta: a `Delta` subclass with its dials bound.
        matrices: (out, in) of the matrices of one FFN.
        estimate: bytes of a whole model with such a delta, cheap, and growing with the delta.
        exact: the same to the byte; asked near the answer only.
        budget: bytes.

    Raises:
        ValueError: even the harshest setting does not fit; or the delta has no such dial.
    """
    dial, choices = dial_of(delta), settings(delta, matrices)

    def at(index: int) -> functools.partial[Delta]:
        return functools.partial(delta.func, **(delta.keywords | {dial: choices[index]}))

    # The estimate may be a few digits of a header too large: one milder setting is tried too.
    index = max(bisect.bisect_left(range(len(choices)), True, key=lambda i: estimate(at(i)) <= budget) - 1, 0)
    while index < len(choices) and exact(at(index)) > budget:
        index += 1
    if index == len(choices):
        raise ValueError(
            f"does not fit: even {dial}={choices[-1]} takes {exact(at(len(choices) - 1)) / 2**30:,.3f} GiB, and the "
            f"budget is {budget / 2**30:,.3f} GiB. Allow more, or choose a smaller model"
        )
    return at(index)
