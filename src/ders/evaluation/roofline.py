"""What this machine can do at most, measured, and how near a layer comes to it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ders.deltas import LowRankDelta, SparseDelta
from ders.evaluation.layers import Mixture, Shape
from ders.evaluation.timing import Stopwatch, significant, stopwatch_of
from ders.moe import SharedBaseMoE


@dataclass(frozen=True)
class Ceilings:
    """The best of several runs: bytes read plus written by a copy, bytes read by a sum, FLOP/s of a large product."""

    copy_bytes_per_second: float
    read_bytes_per_second: float
    flops_per_second: float

    def seconds(self, flops: float, read: float) -> float:
        """The least time for that much work: the larger of the two."""
        return max(flops / self.flops_per_second, read / self.read_bytes_per_second)


def ceilings(device: str, dtype: torch.dtype, *, num_bytes: int = 1 << 29, side: int | None = None) -> Ceilings:
    """Measure on random data, in about three seconds.

    Args:
        num_bytes: of the tensor that is copied and read: more than the caches hold.
        side: of the square matrices; by default 2048 on a CPU, 8192 on a GPU.
    """
    stopwatch = stopwatch_of(device)
    x, copied = torch.empty(2, num_bytes // dtype.itemsize, device=device, dtype=dtype)
    x.normal_()
    copy_seconds = _best(lambda: copied.copy_(x), stopwatch)
    read_seconds = min(_best(run, stopwatch) for run in (x.sum, x.amax))
    side = side or (8192 if device == "cuda" else 2048)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    product_seconds = _best(lambda: a @ b, stopwatch)
    return Ceilings(
        *(significant(value) for value in (2 * num_bytes / copy_seconds, num_bytes / read_seconds)),
        significant(2 * side**3 / product_seconds),
    )


def _best(run: Callable[[], object], stopwatch: Stopwatch) -> float:
    run()
    seconds, started = [], time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - started < 0.6:
        seconds.append(stopwatch(run, 1).wall)
    return min(seconds)


@dataclass(frozen=True)
class Work:
    """What a layer cannot do without: FLOPs, and bytes of weights read (once each)."""

    flops: float
    weight_bytes: float

    def seconds(self, limits: Ceilings, activation_bytes: float) -> float:
        return limits.seconds(self.flops, self.weight_bytes + activation_bytes)


def dense_work(shape: Shape, tokens: int, dtype: torch.dtype, *, backward: bool) -> Work:
    weights = (3 if shape.gated else 2) * shape.hidden * shape.ffn
    passes = 3 if backward else 1  # backward: one product for the inputs, one for the weights
    return Work(2 * tokens * weights * passes, weights * dtype.itemsize * (2 if backward else 1))


def vanilla_work(shape: Shape, mixture: Mixture, tokens: int, dtype: torch.dtype, hit: int, *, backward: bool) -> Work:
    """K FFNs a token; the weights of the experts that are hit."""
    dense = dense_work(shape, tokens, dtype, backward=backward)
    return Work(dense.flops * mixture.top_k, dense.weight_bytes * hit)


def shared_work(
    layer: SharedBaseMoE, shape: Shape, mixture: Mixture, tokens: int, dtype: torch.dtype, hit: int, *, backward: bool
) -> Work:
    """One FFN a token, and the deltas: read as they are stored, multiplied for K choices."""
    dense = dense_work(shape, tokens, dtype, backward=backward)
    deltas = list(layer.experts.deltas.values())
    per_token = sum(_entries(delta) for delta in deltas) * mixture.top_k
    stored = sum(delta.storage_bits() for delta in deltas) / 8  # type: ignore[operator]
    return Work(
        dense.flops + 2 * tokens * per_token * (3 if backward else 1),
        dense.weight_bytes + stored * hit / layer.experts.num_experts * (2 if backward else 1),
    )


def _entries(delta: nn.Module) -> int:
    """Multiplications of one expert's delta for one token."""
    if isinstance(delta, SparseDelta):
        return delta.num_kept
    if isinstance(delta, LowRankDelta):
        return delta.rank * (delta.in_features + delta.out_features)
    return int(delta.in_features * delta.out_features)  # type: ignore[operator]
