"""Paired, interleaved timing: a reference run before and after every variant, ratios round by round.

Other work on a machine slows two neighbouring runs alike: their ratio holds where a time does not.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

# A sample lasts at least this long: shorter runs are repeated within it.
MIN_SAMPLE_SECONDS = 5e-3
# A peer this much slower than the fastest one needs no more rounds to be known as slower.
CLEARLY_SLOWER = 1.25
MAX_ROUNDS = 300

Run = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """Seconds of one run: by the wall clock (or the device's), and of all of the process's threads on the CPU."""

    wall: float
    cpu: float


# (run, repeats) → the mean of that many runs in a row.
Stopwatch = Callable[[Run, int], Sample]


@dataclass(frozen=True)
class Variant:
    """Something to hold against the reference.

    Attributes:
        rounds: leaves after so many; None stays to the end.
        peer: one of several ways to do the same, of which the fastest counts: leaves once it is clearly not that one.
    """

    name: str
    run: Run
    rounds: int | None = None
    peer: bool = False


@dataclass
class Series:
    """Samples of one variant, one a round from the first round on; the reference has one more.

    Attributes:
        to_reference: wall time over the mean of the reference's runs right before and right after.
    """

    samples: list[Sample] = field(default_factory=list)
    to_reference: list[float] = field(default_factory=list)

    @property
    def wall(self) -> float:
        return statistics.median(sample.wall for sample in self.samples)

    @property
    def cpu(self) -> float:
        return statistics.median(sample.cpu for sample in self.samples)


def cpu_stopwatch(run: Run, repeats: int) -> Sample:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        run()
    return Sample((time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats)


class CudaStopwatch:
    """Times of the device by events, each run with a cold second-level cache: another layer's weights were in it."""

    def __init__(self) -> None:
        self.flushed = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Run, repeats: int) -> Sample:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        cpu = time.process_time()
        for start, end in pairs:
            # It also keeps the device busy while the host queues what is measured.
            self.flushed.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        cpu = (time.process_time() - cpu) / repeats
        return Sample(statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3, cpu)


def stopwatch_of(device: str) -> Stopwatch:
    return CudaStopwatch() if device == "cuda" else cpu_stopwatch


def replayed(run: Run) -> Run:
    """The same work as a CUDA graph: one launch instead of many.

    Raises:
        RuntimeError: it waits for the device or allocates outside of torch, so that it cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def paired(
    reference: Run,
    variants: Sequence[Variant],
    stopwatch: Stopwatch,
    budget: float,
    *,
    least: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Series, dict[str, Series]]:
    """Measure in rounds until the budget (seconds by `clock`) is spent, at least `least` rounds.

    One round is reference, variant, reference, next variant, …, reference: every variant stands between two runs of
    the reference, and all of a round's variants ran within the same moments.

    Returns:
        The reference's series and each variant's by name. Round i is entry i in all of them; a variant that left
        early has fewer.
    """
    repeats_of = {variant.name: _warmed_up(variant.run, stopwatch) for variant in variants}
    reference_repeats = _warmed_up(reference, stopwatch)
    base, found = Series(), {variant.name: Series() for variant in variants}
    active, rounds, started = list(variants), 0, clock()
    gc.collect()
    while True:
        before = stopwatch(reference, reference_repeats)
        base.samples.append(before)
        for variant in active:
            sample = stopwatch(variant.run, repeats_of[variant.name])
            after = stopwatch(reference, reference_repeats)
            series = found[variant.name]
            series.samples.append(sample)
            series.to_reference.append(2 * sample.wall / (before.wall + after.wall))
            before = after
        rounds += 1
        spent = clock() - started
        if rounds >= MAX_ROUNDS or (rounds >= least and spent * (rounds + 1) / rounds > budget):
            return base, found
        active = _still_needed(active, found, rounds)


def _warmed_up(run: Run, stopwatch: Stopwatch) -> int:
    """Run once; returns how many runs make a sample, for which a short run is timed again, warm."""
    first = stopwatch(run, 1).wall
    if first > 100 * MIN_SAMPLE_SECONDS:
        return 1
    return max(1, math.ceil(MIN_SAMPLE_SECONDS / max(stopwatch(run, 1).wall, 1e-6)))


def _still_needed(active: list[Variant], found: dict[str, Series], rounds: int) -> list[Variant]:
    medians = {v.name: statistics.median(found[v.name].to_reference) for v in active if v.peer}
    limit = CLEARLY_SLOWER * min(medians.values(), default=math.inf)
    return [
        v
        for v in active
        if (v.rounds is None or rounds < v.rounds) and not (v.peer and rounds >= 2 and medians[v.name] > limit)
    ]


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of ratios, four digits."""
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    low, median, high = (significant(value) for value in quartiles)
    return {"median": median, "low": low, "high": high}


def significant(value: float) -> float:
    return float(f"{value:.4g}")
