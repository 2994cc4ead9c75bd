"""DeRS-LM with ranks by expert: those that serve more tokens get more, at the same total budget.

E experts, O/I out/in features, R ranks of all experts together, M the largest of one, S slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ders.deltas.base import Delta
from ders.deltas.by_layer import largest_remainders
from ders.deltas.low_rank import best_factors, draw_factor_
from ders.kernels import LowRank


class LowRankByLoadDelta(Delta):
    """Δ_e = B_e A_e, of another rank for each expert (arXiv 2503.01359 has one rank for all).

    The R = E · rank rows of A and columns of B are the experts' in turn, as many of each as `ranks_E` says: even at
    birth, by load after `allot_`. They are stored, 4 bytes an expert.

    Args:
        rank: mean over the experts, from 2 on: every expert has at least 1.

    Raises:
        ValueError: rank is out of range, or one expert could get more than the smaller side of this matrix.
    """

    decided = "ranks_E"

    def __init__(self, num_experts: int, out_features: int, in_features: int, *, rank: int, seed: int = 0) -> None:
        super().__init__(num_experts, out_features, in_features, seed=seed)
        if rank < 2:
            raise ValueError(
                f"rank must be at least 2 for experts to share it unevenly: got {rank}. Or use one for all"
            )
        if num_experts * (rank - 1) + 1 > min(out_features, in_features):
            raise ValueError(
                f"rank {rank} could give one of {num_experts} experts more than {min(out_features, in_features)}, the "
                f"smaller side of a {out_features}×{in_features} matrix: set rank to "
                f"{1 + (min(out_features, in_features) - 1) // num_experts} or less"
            )
        self.rank = rank
        self.a_RI = nn.Parameter(torch.empty(num_experts * rank, in_features))
        self.b_OR = nn.Parameter(torch.zeros(out_features, num_experts * rank))
        draw_factor_(self.a_RI, seed)
        self.register_buffer("ranks_E", torch.full((num_experts,), rank, dtype=torch.int32))
        # Derived on first use.
        self.register_buffer("owner_R", None, persistent=False)
        self.register_buffer("places_EM", None, persistent=False)

    ranks_E: Tensor
    owner_R: Tensor | None
    places_EM: Tensor | None

    @torch.no_grad()
    def allot_(self, loads_E: Tensor) -> None:
        """Ranks in proportion to loads, at least 1 each. Before training: what was learnt would change hands.

        Args:
            loads_E: tokens that each expert serves.

        Raises:
            ValueError: the delta is trained, or no expert serves any.
        """
        total = float(loads_E.sum())
        if total <= 0:
            raise ValueError("ranks are allotted by the tokens that experts serve: there is none")
        if self.b_OR.any():
            raise ValueError("ranks are allotted before training: this delta is no longer zero")
        spare = self.num_experts * (self.rank - 1)
        ranks = largest_remainders([1 + spare * load / total for load in loads_E.tolist()])
        self.ranks_E.copy_(torch.tensor(ranks))
        self.restore_()

    def restore_(self) -> None:
        self.owner_R = self.places_EM = None

    # A compiler takes what it finds here for a constant: ranks do not change while a compiled layer is in use.
    @torch.compiler.assume_constant_result
    def _derive(self) -> tuple[Tensor, Tensor]:
        """The expert of each rank (R,), and the ranks of each expert (E, M), R where it has no more."""
        if self.owner_R is None or self.places_EM is None:
            with torch.inference_mode(False):  # they outlive the step that first asked for them
                ranks_E = self.ranks_E.long()
                number_M = torch.arange(int(ranks_E.max()), device=ranks_E.device)
                places_EM = (ranks_E.cumsum(0) - ranks_E)[:, None] + number_M
                self.places_EM = places_EM.masked_fill(number_M >= ranks_E[:, None], len(self.a_RI))
                self.owner_R = torch.arange(self.num_experts, device=ranks_E.device).repeat_interleave(ranks_E)
        return self.owner_R, self.places_EM

    def _mine(self, expert: int) -> slice:
        end = int(self.ranks_E[: expert + 1].sum())
        return slice(end - int(self.ranks_E[expert]), end)

    def dense(self, expert: int) -> Tensor:
        mine = self._mine(expert)
        return self.b_OR[:, mine] @ self.a_RI[mine]

    def forward(self, x_SI: Tensor, expert_S: Tensor) -> Tensor:
        # As where all have the same rank: two plain products, and no slot has to move.
        owner_R, _ = self._derive()
        z_SR = F.linear(x_SI, self.a_RI)
        return F.linear(z_SR * (expert_S[:, None] == owner_R).to(z_SR.dtype), self.b_OR)

    def form(self) -> LowRank:
        # Experts of fewer ranks are filled up with zeros.
        _, places_EM = self._derive()
        a_EMI = F.pad(self.a_RI, (0, 0, 0, 1))[places_EM]
        b_EOM = F.pad(self.b_OR, (0, 1)).T[places_EM].transpose(1, 2)
        return LowRank(a_EMI, b_EOM)

    @torch.no_grad()
    def fit_expert_(self, expert: int, delta_OI: Tensor) -> None:
        """The best factors of this expert's rank: see `best_factors`."""
        mine = self._mine(expert)
        a_RI, b_OR = best_factors(delta_OI, mine.stop - mine.start)
        self.a_RI[mine], self.b_OR[:, mine] = a_RI.to(self.a_RI.dtype), b_OR.to(self.b_OR.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank} in the mean"
