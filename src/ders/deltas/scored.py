"""DeRS-SM at chosen positions: each expert keeps its share of the entries that score best.

E experts, O/I out/in features, N kept entries of a matrix.
"""

import torch
from torch import Tensor

from ders.deltas.sparse import SparseDelta
from ders.kernels import largest_positions


class ScoredSparseDelta(SparseDelta):
    """Values at N positions per expert that are chosen once, before training, by a score of every entry.

    Not in arXiv 2503.01359, whose positions are random. Experts are born equal, so a score cannot tell them apart: the
    E·N best entries are dealt out like cards, best first, so that supports are disjoint and equally good. They are
    stored as those chosen by magnitude are. Before `choose_`, all experts have the first N entries.

    Args:
        sparsity: fraction of zeros, from 1 − 1/E on.

    Raises:
        ValueError: sparsity is out of range, or leaves the experts no disjoint shares.
    """

    def __init__(
        self, num_experts: int, out_features: int, in_features: int, *, sparsity: float, seed: int = 0
    ) -> None:
        super().__init__(num_experts, out_features, in_features, sparsity=sparsity, selection="magnitude", seed=seed)
        if num_experts * self.num_kept > self.size:
            raise ValueError(
                f"sparsity must be at least {1 - 1 / num_experts:.4g} for {num_experts} experts to have positions of "
                f"their own: got {sparsity}"
            )

    @torch.no_grad()
    def choose_(self, scores_OI: Tensor) -> None:
        """Deal out the E·N entries of the largest |score|."""
        best = largest_positions(scores_OI, self.num_experts * self.num_kept)
        ranked = best[scores_OI.abs().flatten()[best].argsort(descending=True, stable=True)]
        for expert in range(self.num_experts):
            self.place_expert_(expert, ranked[expert :: self.num_experts].sort().values)
