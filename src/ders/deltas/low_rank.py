"""DeRS-LM: each expert differs from the base by a product of two thin factors.

E experts, O/I out/in features, R rank, S slots.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ders.deltas.base import Delta
from ders.kernels import LowRank


class LowRankDelta(Delta):
    """Δ_e = B_e A_e with A random and B zero at birth, without LoRA's alpha scale (section 3.3 of arXiv 2503.01359).

    The paper does not say how A is drawn; here Kaiming-uniform with a = √5, as LoRA does.

    Args:
        rank: R, from 1 to min(O, I).

    Raises:
        ValueError: rank is out of range for this matrix.
    """

    def __init__(self, num_experts: int, out_features: int, in_features: int, *, rank: int, seed: int = 0) -> None:
        super().__init__(num_experts, out_features, in_features, seed=seed)
        if not 1 <= rank <= min(out_features, in_features):
            raise ValueError(
                f"rank must be between 1 and {min(out_features, in_features)}, the smaller side of a "
                f"{out_features}×{in_features} matrix: got {rank}"
            )
        self.rank = rank
        self.a_ERI = nn.Parameter(torch.empty(num_experts, rank, in_features))
        self.b_EOR = nn.Parameter(torch.zeros(num_experts, out_features, rank))
        draw_factor_(self.a_ERI, seed)

    def dense(self, expert: int) -> Tensor:
        return self.b_EOR[expert] @ self.a_ERI[expert]

    def forward(self, x_SI: Tensor, expert_S: Tensor) -> Tensor:
        # All experts' thin factors in two plain products: E·R columns are few, and no slot has to move.
        z_SER = F.linear(x_SI, self.a_ERI.flatten(0, 1)).unflatten(1, (self.num_experts, self.rank))
        mine_SE1 = F.one_hot(expert_S, self.num_experts).unsqueeze(2).to(z_SER.dtype)
        b_OER = self.b_EOR.transpose(0, 1).flatten(1)
        return F.linear((z_SER * mine_SE1).flatten(1), b_OER)

    def form(self) -> LowRank:
        return LowRank(self.a_ERI, self.b_EOR)

    @torch.no_grad()
    def fit_expert_(self, expert: int, delta_OI: Tensor) -> None:
        """The best factors of this rank: see `best_factors`."""
        a_RI, b_OR = best_factors(delta_OI, self.rank)
        self.a_ERI[expert] = a_RI.to(self.a_ERI.dtype)
        self.b_EOR[expert] = b_OR.to(self.b_EOR.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


@torch.no_grad()
def draw_factor_(a: Tensor, seed: int) -> None:
    """Kaiming-uniform with a = √5 (…, I), by the seed alone; on the meta device nothing is drawn."""
    if not a.is_meta:
        generator = torch.Generator("cpu").manual_seed(seed)  # the same factors on every device
        bound = 1 / math.sqrt(a.shape[-1])  # what it comes to
        a.copy_(torch.empty(a.shape, device="cpu").uniform_(-bound, bound, generator=generator))


def best_factors(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors A (R, I) and B (O, R) whose product is closest in the Frobenius norm (Eckart–Young), in float64.

    From the smaller Gram matrix: squaring loses singular values below 1e-8 of the largest, which add nothing to the
    error; it costs a fifth of a full SVD.
    """
    tall = delta_OI.shape[0] > delta_OI.shape[1]
    wide = delta_OI.double().T if tall else delta_OI.double()
    leading_MR = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:].flip(1)
    # U (Uᵀ Δ): the projection on the leading singular vectors, its scale shared evenly between the factors.
    projected_RN = leading_MR.T @ wide
    root_R = projected_RN.norm(dim=1).sqrt().clamp(min=1e-150)
    left, right = leading_MR * root_R, projected_RN / root_R[:, None]
    return (left.T, right.T) if tall else (right, left)
