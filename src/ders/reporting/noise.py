"""How far our differences may be off by chance: intervals of Student's t from the spread over seeds."""

import functools
import math
from statistics import mean

from ders.reporting.comparisons import Comparison

# What all of a claim's intervals together leave, two-sided.
LEVEL = 0.05


def noise_of(comparisons: list[Comparison]) -> list[float]:
    """How far each comparison's mean may be off: half its interval; of scores at least one question, of counts nothing.

    A claim falls with any of its comparisons, so that `LEVEL` is divided by how many of them chance may decide
    (Bonferroni's correction). The spread is pooled over the score comparisons, for that of two or three seeds alone
    says little; they share vanilla runs, so that it is rather too small. NaN where nothing was run twice.
    """
    by_chance = [c for c in comparisons if c.ours and not c.exact]
    level = LEVEL / max(1, len(by_chance))
    pooled = [c for c in by_chance if c.quantity is None]
    noise = []
    for comparison in comparisons:
        if comparison.exact:
            noise.append(0.0)
        elif comparison.quantity:
            noise.append(_interval(len(comparison.ours), [comparison], level))
        else:
            interval = _interval(len(comparison.ours), pooled, level)
            noise.append(interval if math.isnan(interval) else max(interval, comparison.question))
    return noise


def _interval(seeds: int, pool: list[Comparison], level: float) -> float:
    freedom = sum(len(c.ours) - 1 for c in pool if c.ours)
    if freedom < 1 or not seeds:
        return math.nan
    squares = sum((value - mean(c.ours)) ** 2 for c in pool for value in c.ours)
    return t_quantile(level, freedom) * math.sqrt(squares / freedom / seeds)


@functools.cache
def t_quantile(level: float, freedom: int) -> float:
    """What a t of so many degrees of freedom exceeds in size with probability `level`."""
    from scipy.stats import t  # slow to import, and needed for verdicts only

    return float(t.isf(level / 2, freedom))
