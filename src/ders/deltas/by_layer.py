"""DeRS-LM with ranks that grow or shrink with depth, at the same total budget."""

import math
from typing import Any

from ders.deltas.base import Place
from ders.deltas.low_rank import LowRankDelta


class LowRankByLayerDelta(LowRankDelta):
    """Δ_e = B_e A_e, of another rank in each replaced layer (arXiv 2503.01359 has one rank for all).

    Args:
        rank: mean over the replaced layers, from 2 on: every layer has at least 1.
        tilt: from −1 to 1, how much of what is above 1 moves: 0.5 gives the last layer 1.5 times its even share and
            the first one half; negative values favour the first layers.

    Raises:
        ValueError: a dial is out of range, or a layer's rank is for its matrices.
    """

    def __init__(
        self, num_experts: int, out_features: int, in_features: int, *, rank: int, tilt: float, seed: int = 0
    ) -> None:
        if not -1 <= tilt <= 1:
            raise ValueError(f"tilt must be between -1 and 1: got {tilt}")
        super().__init__(num_experts, out_features, in_features, rank=rank, seed=seed)
        self.tilt = tilt

    @classmethod
    def at(
        cls, place: Place, num_experts: int, out_features: int, in_features: int, **dials: Any
    ) -> "LowRankByLayerDelta":
        """With its layer's share of all ranks together."""
        rank, tilt = dials["rank"], dials["tilt"]
        if rank < 2:
            raise ValueError(f"rank must be at least 2 for layers to share it unevenly: got {rank}. Or use one for all")
        here = {"rank": ranks_by_layer(rank, tilt, place.num_layers)[place.layer], "seed": place.seed}
        return cls(num_experts, out_features, in_features, **{**dials, **here})


def ranks_by_layer(rank: int, tilt: float, num_layers: int) -> list[int]:
    """Ranks that change evenly with depth, at least 1 each, rank · num_layers together (largest remainders first)."""
    if num_layers == 1:
        return [rank]
    shares = [1 + (rank - 1) * (1 + tilt * (2 * layer / (num_layers - 1) - 1)) for layer in range(num_layers)]
    return largest_remainders(shares)


def largest_remainders(shares: list[float]) -> list[int]:
    """Shares that sum to a whole number, as whole numbers with the same sum, each within one of its share."""
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: shares[i] - counts[i], reverse=True)
    for i in by_remainder[: round(sum(shares)) - sum(counts)]:
        counts[i] += 1
    return counts
