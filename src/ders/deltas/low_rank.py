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
        if not self.a_ERI.is_meta:
            generator = torch.Generator("cpu").manual_seed(seed)  # the same factors on every device
            bound = 1 / math.sqrt(in_features)  # what Kaiming-uniform with a = √5 comes to
            drawn = torch.empty(self.a_ERI.shape, device="cpu").uniform_(-bound, bound, generator=generator)
            self.a_ERI.data.copy_(drawn)

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
        """The best factors of this rank in the Frobenius norm (Eckart–Young), from the smaller Gram matrix in float64.

        Squaring loses singular values below 1e-8 of the largest, which add nothing to the error; it costs a fifth of a
        full SVD.
        """
        wide = delta_OI.double() if self.out_features <= self.in_features else delta_OI.double().T
        leading_MR = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -self.rank :].flip(1)
        # U (Uᵀ Δ): the projection on the leading singular vectors, its scale shared evenly between the factors.
        projected_RN = leading_MR.T @ wide
        root_R = projected_RN.norm(dim=1).sqrt().clamp(min=1e-150)
        left, right = leading_MR * root_R, projected_RN / root_R[:, None]
        b_OR, a_RI = (left, right) if self.out_features <= self.in_features else (right.T, left.T)
        self.b_EOR[expert] = b_OR.to(self.b_EOR.dtype)
        self.a_ERI[expert] = a_RI.to(self.a_ERI.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
