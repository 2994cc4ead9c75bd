"""Routers: which experts a token goes to, and with what weight.

T tokens, D model width, E experts, K top-k.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ders.kernels import global_sum, stable_hash


@dataclass
class Routing:
    """One decision of a router.

    Attributes:
        probs_TE: softmax over all experts, fp32 or wider.
        top_k_index_TK: chosen experts, first choice first.
        top_k_weights_TK: gate weights; a choice dropped for capacity has weight zero.
        load_TE: chance that an expert is chosen, where noise makes that differentiable; else None.
    """

    probs_TE: Tensor
    top_k_index_TK: Tensor
    top_k_weights_TK: Tensor
    load_TE: Tensor | None = None


def load_balancing_loss(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """E · Σ_e (mean probability of e) · (share of tokens whose first choice is e): 1 when balanced.

    The loss of GShard and MoE-LLaVA (DeepSpeed's l_aux), from first choices before any drop. Tokens where `mask_T` is
    zero (padding) are left out. Shares are taken over the tokens of all processes, so that the average of the
    processes' losses is the loss of one process on the whole batch.
    """
    probs_TE = routing.probs_TE
    num_experts = probs_TE.shape[1]
    mask_T = torch.ones_like(probs_TE[:, 0]) if mask_T is None else mask_T.to(probs_TE.dtype)
    first_TE = F.one_hot(routing.top_k_index_TK[:, 0], num_experts).to(probs_TE.dtype) * mask_T[:, None]
    totals = global_sum(torch.cat([first_TE.sum(0), mask_T.sum()[None], mask_T.new_ones(1)]))
    share_E, num_tokens, num_processes = totals[:-2], totals[-2], totals[-1]
    num_tokens = num_tokens.clamp(min=1)
    mean_prob_E = (probs_TE * mask_T[:, None]).sum(0) * num_processes / num_tokens
    return num_experts * (mean_prob_E * share_E / num_tokens).sum()


class Router(nn.Module):
    """The seam where routers plug in. Defining a subclass registers it under its class name, as files refer to it.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K, from 1 to E.
        frozen: its weights stay as they are, whatever else trains.
        seed: decides the random weights, and nothing else does: methods compared under one seed start from one router.
    """

    known: ClassVar[dict[str, type["Router"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Router.known[cls.__name__] = cls

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, frozen: bool = False, seed: int = 0) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1: got {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts={num_experts}: got {top_k}")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.frozen, self.seed = frozen, seed
        # False where an optimizer keeps fp32 masters of weights that must all be of one type.
        self.keeps_fp32 = True

    def drawn(self, out_features: int, in_features: int, name: str = "router") -> nn.Parameter:
        """A weight (O, I) in fp32, uniform in ±1/√I as torch's linear layers, by seed and name alone."""
        weight_OI = torch.empty(out_features, in_features, dtype=torch.float32)
        if not weight_OI.is_meta:
            generator = torch.Generator("cpu").manual_seed(stable_hash(self.seed, name))  # the same on every device
            bound = 1 / math.sqrt(in_features)
            weight_OI.copy_(torch.empty(weight_OI.shape, device="cpu").uniform_(-bound, bound, generator=generator))
        return nn.Parameter(weight_OI)

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        # Weights stay in fp32 when the model is cast to half precision: bf16 ties make experts swap between runs.
        before = {name: parameter.data for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters() if self.keeps_fp32 else ():
            if parameter.dtype in (torch.bfloat16, torch.float16) and not parameter.is_meta:
                parameter.data = before[name].to(parameter.device)
        return self

    @property
    def preserves_function(self) -> bool:
        """Whether the gate weights of a token sum to one, so that equal experts act as one FFN."""
        raise NotImplementedError

    @property
    def depends_on_batch(self) -> bool:
        """Whether, in evaluation, a token's experts depend on the other tokens at hand or on a draw."""
        return False

    def forward(self, x_TD: Tensor) -> Routing:
        raise NotImplementedError

    def loss(self, routing: Routing, mask_T: Tensor | None = None) -> Tensor:
        """What training adds to the task's loss, before its coefficient."""
        return load_balancing_loss(routing, mask_T)


class TopKRouter(Router):
    """MoE-LLaVA's router: an fp32 linear layer, softmax over all experts, then the top k.

    With k ≥ 2 the chosen probabilities are renormalised to sum to one; with k = 1 the weight is the raw probability
    (a renormalised top-1 gate is constant and would leave the router without a gradient from the task).

    Args:
        bias: the linear layer has one, zero at first (Med-MoE's has).
        renormalize: whether the chosen probabilities are renormalised, where that is not as above: Mixtral does it with
            k = 1 too, Qwen2-MoE may leave it with any k.
        second_choice_noise: the second choice is the argmax of logits + Gumbel noise with the first choice left out,
            in training and in evaluation, as DeepSpeed's top-2 gate does; weights stay noise-free. Only with top_k=2.
        capacity_factor: in training an expert takes at most ceil(K·T/E · factor) choices, first choices before second
            ones, in token order; what is over is dropped before the weights are renormalised. None: nothing is dropped.
        eval_capacity_factor: the same in evaluation.
        min_capacity: the least capacity of an expert.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        renormalize: bool | None = None,
        second_choice_noise: bool = False,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 0,
        frozen: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, frozen=frozen, seed=seed)
        if second_choice_noise and top_k != 2:
            raise ValueError(f"second_choice_noise is defined for top_k=2 only: got top_k={top_k}")
        for name, factor in [("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)]:
            if factor is not None and factor <= 0:
                raise ValueError(f"{name} must be positive, or null for no limit: got {factor}")
        self.renormalize = top_k > 1 if renormalize is None else renormalize
        self.second_choice_noise = second_choice_noise
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity = min_capacity
        self.weight = self.drawn(num_experts, hidden_size)
        self.bias = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32)) if bias else None

    @property
    def preserves_function(self) -> bool:
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        return self.renormalize and factor is None

    @property
    def depends_on_batch(self) -> bool:
        return self.second_choice_noise or self.eval_capacity_factor is not None

    def forward(self, x_TD: Tensor) -> Routing:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            bias_E = None if self.bias is None else self.bias.to(dtype)
            logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype), bias_E)
            probs_TE = logits_TE.softmax(dim=-1)
        index_TK = self._choose(logits_TE.detach())
        weights_TK = probs_TE.gather(1, index_TK)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is not None:
            weights_TK = weights_TK * self._within_capacity(index_TK, factor)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).eps)
        return Routing(probs_TE, index_TK, weights_TK)

    def _choose(self, logits_TE: Tensor) -> Tensor:
        if not self.second_choice_noise:
            return logits_TE.topk(self.top_k, dim=-1).indices
        first_T1 = logits_TE.argmax(-1, keepdim=True)
        noisy_TE = logits_TE - torch.empty_like(logits_TE).exponential_().log()
        return torch.cat([first_T1, noisy_TE.scatter(1, first_T1, -math.inf).argmax(-1, keepdim=True)], dim=1)

    def _within_capacity(self, index_TK: Tensor, factor: float) -> Tensor:
        num_tokens = len(index_TK)
        capacity = max(math.ceil(self.top_k * num_tokens / self.num_experts * factor), self.min_capacity)
        # Choice-major order: every first choice is served before any second one.
        chosen_CE = F.one_hot(index_TK.T.flatten(), self.num_experts)
        place_C = (chosen_CE.cumsum(0) * chosen_CE).sum(-1)
        return (place_C <= capacity).view(self.top_k, num_tokens).T

    def extra_repr(self) -> str:
        return f"{self.hidden_size} → top {self.top_k} of {self.num_experts}"
