"""DeRS-SM: each expert differs from the base at a few fixed, random positions.

E experts, O/I out/in features, N kept entries of a matrix, P = O + 1 row boundaries, S slots.
"""

import math

import torch
from torch import Tensor, nn

from ders.deltas.base import Delta
from ders.kernels import sample_positions, sparse_linear, stable_hash


class SparseDelta(Delta):
    """Trainable values at N = round((1 − sparsity)·O·I) positions per expert (section 3.3 of arXiv 2503.01359).

    Positions are distinct, uniform and frozen; they follow from one stored 64-bit seed per expert and cost no bytes.

    Args:
        sparsity: fraction of zeros, in [0, 1).

    Raises:
        ValueError: sparsity is out of range, or so high that no entry of this matrix is kept.
    """

    def __init__(
        self, num_experts: int, out_features: int, in_features: int, *, sparsity: float, seed: int = 0
    ) -> None:
        super().__init__(num_experts, out_features, in_features, seed=seed)
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), the fraction of zeros: got {sparsity}")
        size = out_features * in_features
        self.sparsity = sparsity
        self.num_kept = round((1 - sparsity) * size)
        if self.num_kept == 0:
            raise ValueError(
                f"sparsity {sparsity} keeps none of the {size} entries of a {out_features}×{in_features} matrix: "
                f"set sparsity to {_largest_sparsity(size)} or less"
            )
        if size >= 2**31:
            raise ValueError(f"a {out_features}×{in_features} matrix has more entries than 32-bit indices can name")
        self.values_EN = nn.Parameter(torch.zeros(num_experts, self.num_kept))
        seeds = [stable_hash(seed, expert) for expert in range(num_experts)]
        self.register_buffer("seeds_E", torch.tensor(seeds, dtype=torch.int64))
        self.register_buffer("columns_EN", torch.empty(num_experts, self.num_kept, dtype=torch.int32), persistent=False)
        self.register_buffer(
            "row_starts_EP", torch.empty(num_experts, out_features + 1, dtype=torch.int32), persistent=False
        )
        self.restore_()

    seeds_E: Tensor
    columns_EN: Tensor
    row_starts_EP: Tensor

    def restore_(self) -> None:
        if self.seeds_E.is_meta:
            return
        for expert, seed in enumerate(self.seeds_E.tolist()):
            positions_N = self._positions(seed)
            self.columns_EN[expert] = positions_N % self.in_features
            boundaries_P = torch.arange(self.out_features + 1, device=positions_N.device) * self.in_features
            self.row_starts_EP[expert] = torch.searchsorted(positions_N, boundaries_P)

    def _positions(self, seed: int) -> Tensor:
        return sample_positions(self.num_kept, self.out_features, self.in_features, seed, self.values_EN.device)

    def dense(self, expert: int) -> Tensor:
        flat = self.values_EN.new_zeros(self.out_features * self.in_features)
        positions_N = self._positions(int(self.seeds_E[expert]))
        return flat.index_put((positions_N,), self.values_EN[expert]).view(self.out_features, self.in_features)

    def forward(self, x_SI: Tensor, expert_S: Tensor) -> Tensor:
        return sparse_linear(x_SI, expert_S, self.values_EN, self.columns_EN, self.row_starts_EP)

    @torch.no_grad()
    def fit_(self, delta_EOI: Tensor) -> "SparseDelta":
        """Keeps the entries at the drawn positions; on a fixed support no choice of values is closer."""
        for expert, seed in enumerate(self.seeds_E.tolist()):
            self.values_EN[expert] = delta_EOI[expert].flatten()[self._positions(seed)]
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparsity={self.sparsity}, {self.num_kept} kept per matrix"


def _largest_sparsity(size: int) -> float:
    """1 − 1/size, rounded down to a number short enough to type."""
    digits = 10 ** (len(str(size)) + 1)
    return math.floor((1 - 1 / size) * digits) / digits
