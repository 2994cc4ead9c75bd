"""The code recipe's gate: a small MLP with learned noise, balanced by importance and load.

T tokens, D model width, E experts, K top-k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ders.kernels import global_sum
from ders.moe.router import Router, Routing

# The least standard deviation of the noise, and what keeps the variation of an empty vector finite.
_MIN_NOISE, _EPSILON = 1e-2, 1e-10


class NoisyMLPRouter(Router):
    """XFT's gate: D → E → E with a tanh between, no biases; softmax over all experts, then the top k, unnormalised.

    In training a token's logits get Gaussian noise of a learned size, softplus(x·W_noise) + 0.01 with W_noise zero at
    first (Shazeer et al., 1701.06538, eq. 4); in evaluation there is none. Nothing is dropped.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, frozen: bool = False, seed: int = 0) -> None:
        super().__init__(hidden_size, num_experts, top_k, frozen=frozen, seed=seed)
        self.weight_in = self.drawn(num_experts, hidden_size, "in")
        self.weight_out = self.drawn(num_experts, num_experts, "out")
        self.weight_noise = nn.Parameter(torch.zeros(num_experts, hidden_size, dtype=torch.float32))

    @property
    def preserves_function(self) -> bool:
        return False

    def forward(self, x_TD: Tensor) -> Routing:
        dtype = torch.promote_types(self.weight_in.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(dtype)
            hidden_TE = torch.tanh(F.linear(x_TD, self.weight_in.to(dtype)))
            clean_TE = F.linear(hidden_TE, self.weight_out.to(dtype))
            logits_TE, load_TE = clean_TE, None
            if self.training:
                deviation_TE = F.softplus(F.linear(x_TD, self.weight_noise.to(dtype))) + _MIN_NOISE
                logits_TE = clean_TE + torch.randn_like(clean_TE) * deviation_TE
                if self.top_k < self.num_experts:
                    load_TE = chance_of_choice(clean_TE, logits_TE, deviation_TE, self.top_k)
            probs_TE = logits_TE.softmax(dim=-1)
        index_TK = logits_TE.detach().topk(self.top_k, dim=-1).indices
        return Routing(probs_TE, index_TK, probs_TE.gather(1, index_TK), load_TE)

    def loss(self, routing: Routing, mask_T: Tensor | None = None) -> Tensor:
        """CV²(importance) + CV²(load): squared variation over experts of the gate weights' sums and of the loads.

        Importance sums the weights an expert is chosen with, load the chances that it is chosen (1701.06538, eq. 6 and
        appendix A). Tokens where `mask_T` is zero (padding) are left out; sums are over the tokens of all processes.
        """
        weights_TE = torch.zeros_like(routing.probs_TE).scatter(1, routing.top_k_index_TK, routing.top_k_weights_TK)
        load_TE = (weights_TE > 0).to(weights_TE.dtype) if routing.load_TE is None else routing.load_TE
        kept_T1 = torch.ones_like(weights_TE[:, :1]) if mask_T is None else mask_T.to(weights_TE.dtype)[:, None]
        return squared_variation(_over_all((weights_TE * kept_T1).sum(0))) + squared_variation(
            _over_all((load_TE * kept_T1).sum(0))
        )


def chance_of_choice(clean_TE: Tensor, noisy_TE: Tensor, deviation_TE: Tensor, top_k: int) -> Tensor:
    """P(expert e is among a token's top k) (T, E), if its own noise were drawn again (1701.06538, eq. 8 and 9).

    An expert is chosen when it beats the k-th largest of the others' noisy logits.
    """
    best_TX, index_TX = noisy_TE.topk(top_k + 1, dim=-1)
    chosen_TE = torch.zeros_like(noisy_TE).scatter(1, index_TX[:, :top_k], 1.0).bool()
    # A chosen expert's own logit is among the k largest: what it must beat is the one after them.
    threshold_TE = torch.where(chosen_TE, best_TX[:, top_k, None], best_TX[:, top_k - 1, None])
    return torch.special.ndtr((clean_TE - threshold_TE) / deviation_TE)


def squared_variation(sums_E: Tensor) -> Tensor:
    """Variance over squared mean: zero when balanced; zero by definition for one expert."""
    if len(sums_E) == 1:
        return sums_E.sum() * 0
    return sums_E.var() / (sums_E.mean() ** 2 + _EPSILON)


def _over_all(sums_E: Tensor) -> Tensor:
    """The sum over all processes; the gradient is the own part's times their number, which averaging takes out."""
    totals = global_sum(torch.cat([sums_E.detach(), sums_E.new_ones(1)]))
    return totals[:-1] + (sums_E - sums_E.detach()) * totals[-1]
