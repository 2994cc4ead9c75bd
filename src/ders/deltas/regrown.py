"""DeRS-SM whose positions move: the least used are dropped during training and others grown.

E experts, O/I out/in features, N kept entries of a matrix, S slots.
"""

import torch
from torch import Tensor

from ders.deltas.sparse import SparseDelta
from ders.kernels import Sparse, largest_positions, pack_positions, sample_positions, stable_hash


class RegrownSparseDelta(SparseDelta):
    """Values at N positions per expert, random at birth, stored, and exchanged in training (RigL, arXiv 1911.11134).

    Not in arXiv 2503.01359, whose positions are frozen. Who trains calls `regrown` and `rearrange_` every so often.

    Attributes:
        watching: a list receives (x, experts, result) of every call of `forward`, and layers then go through it: what
            the gradient of an expert's full weight is made of. None: nobody watches.

    Args:
        sparsity: fraction of zeros, in [0, 1).
    """

    def __init__(
        self, num_experts: int, out_features: int, in_features: int, *, sparsity: float, seed: int = 0
    ) -> None:
        super().__init__(num_experts, out_features, in_features, sparsity=sparsity, selection="magnitude", seed=seed)
        self.watching: list[tuple[Tensor, Tensor, Tensor]] | None = None
        if not self.support_EB.is_meta:
            for expert in range(num_experts):
                drawn = sample_positions(self.num_kept, out_features, in_features, stable_hash(seed, expert))
                self.support_EB[expert] = pack_positions(drawn, self.size)

    def forward(self, x_SI: Tensor, expert_S: Tensor) -> Tensor:
        y_SO = super().forward(x_SI, expert_S)
        if self.watching is not None:
            self.watching.append((x_SI, expert_S, y_SO))
        return y_SO

    def form(self) -> Sparse | None:  # type: ignore[override]
        return None if self.watching is not None else super().form()

    @torch.no_grad()
    def regrown(self, expert: int, count: int, scores_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Which positions an expert would have, and which of its entries each of them is (−1: new): (N,), (N,).

        The `count` smallest values are dropped, and of all entries outside the rest (those just dropped among them, as
        in the paper) the `count` with the largest |score| are grown. Where fewer have a score at all (no token went to
        this expert), everything stays.
        """
        positions_N = self.positions(expert)
        kept = self.values_EN[expert].abs().argsort(stable=True)[count:]
        outside = scores_OI.abs().flatten().index_fill(0, positions_N[kept], 0)
        if int(outside.count_nonzero()) < count or count == 0:
            return positions_N, torch.arange(self.num_kept, device=positions_N.device)
        moved_N, order = torch.cat([positions_N[kept], largest_positions(outside, count)]).sort()
        return moved_N, torch.cat([kept, kept.new_full((count,), -1)])[order]

    @torch.no_grad()
    def rearrange_(self, expert: int, positions_N: Tensor, source_N: Tensor) -> None:
        """Move an expert to the positions of `regrown`: entries keep their values, new ones are zero."""
        self.values_EN[expert] = rearranged(self.values_EN[expert], source_N)
        self.place_expert_(expert, positions_N)


def rearranged(entries_N: Tensor, source_N: Tensor) -> Tensor:
    """What belongs to entries (N,), in the order of `source`: zero where it is −1."""
    return entries_N[source_N.clamp(min=0)].where(source_N >= 0, 0)
