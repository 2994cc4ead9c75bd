"""No delta at all: the control that asks what the base alone is worth."""

import torch
from torch import Tensor

from ders.deltas.base import Delta
from ders.kernels import LowRank


class ZeroDelta(Delta):
    """Δ_e = 0: every expert is the base. It has no dials and occupies nothing."""

    def dense(self, expert: int) -> Tensor:
        return torch.zeros(self.out_features, self.in_features)

    def forward(self, x_SI: Tensor, expert_S: Tensor) -> Tensor:
        return x_SI.new_zeros(len(x_SI), self.out_features)

    def form(self) -> LowRank:
        """Of rank zero."""
        nothing = torch.zeros(0)
        return LowRank(
            nothing.new_zeros(self.num_experts, 0, self.in_features),
            nothing.new_zeros(self.num_experts, self.out_features, 0),
        )

    def fit_expert_(self, expert: int, delta_OI: Tensor) -> None:
        """Nothing of the trained delta is kept."""
