"""Experts: functions of (hidden states, chosen experts, gate weights), as Hugging Face's experts are.

T tokens, D model width, F hidden width of the FFN, E experts, K top-k, S = T·K slots (a token and one of its choices),
O/I out/in features of a projection.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ders.deltas import Delta
from ders.kernels import grouped_linear
from ders.moe.ffn import FFN


def expert_biases(linears: Mapping[str, nn.Linear], num_experts: int) -> nn.ParameterDict:
    """One bias (E, O) per projection that has one, each expert starting from the dense one."""
    return nn.ParameterDict(
        {
            name: nn.Parameter(linear.bias.detach().expand(num_experts, -1).clone())
            for name, linear in linears.items()
            if linear.bias is not None
        }
    )


class VanillaExperts(nn.Module):
    """E independent copies of the dense FFN: the baseline everything is held against (sparse upcycling, 2212.05055).

    Each projection is one stacked tensor (E, O, I), so every step touches every expert's tensor.
    """

    def __init__(self, dense: nn.Module, form: FFN, num_experts: int) -> None:
        super().__init__()
        linears = form.linears(dense)
        self.form, self.num_experts = form, num_experts
        self.activation = getattr(dense, form.activation)
        self.weights_EOI = nn.ParameterDict(
            {n: nn.Parameter(lin.weight.detach().expand(num_experts, -1, -1).clone()) for n, lin in linears.items()}
        )
        self.biases_EO = expert_biases(linears, num_experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D), (T, K), (T, K) → (T, D): Σ_k g_k FFN_{e_k}(x)."""
        top_k = top_k_index.shape[1]
        order_S = top_k_index.flatten().argsort(stable=True)
        expert_S = top_k_index.flatten()[order_S]
        token_S = order_S // top_k
        counts_E = expert_S.bincount(minlength=self.num_experts)

        def project(name: str, x_SI: Tensor) -> Tensor:
            y_SO = grouped_linear(x_SI, counts_E, self.weights_EOI[name])
            return y_SO + self.biases_EO[name][expert_S] if name in self.biases_EO else y_SO

        x_SD = hidden_states[token_S]
        h_SF = self.form.hidden([project(name, x_SD) for name in self.form.inputs], self.activation)
        y_SD = project(self.form.output, h_SF) * top_k_weights.flatten()[order_S, None].to(h_SF.dtype)
        return torch.zeros_like(hidden_states).index_add(0, token_S, y_SD.to(hidden_states.dtype))


class SharedBaseExperts(nn.Module):
    """E experts that are one shared base and E deltas; W_base + Δ_e is never built.

    With W_e = W + Δ_e, x·W_e = x·W + x·Δ_e: the base is applied once per token, whatever k is. The output projection is
    linear, so Σ_k g_k W_e h_k = W(Σ_k g_k h_k) + Σ_k g_k Δ_e h_k: once per token again.

    The base's linear layers are passed at call time, for they are children of the layer, under their dense names.
    """

    def __init__(self, dense: nn.Module, form: FFN, num_experts: int, make_delta: Callable[..., Delta]) -> None:
        super().__init__()
        linears = form.linears(dense)
        self.form, self.num_experts = form, num_experts
        self.deltas = nn.ModuleDict(
            {n: make_delta(n, num_experts, lin.out_features, lin.in_features) for n, lin in linears.items()}
        )
        self.biases_EO = expert_biases(linears, num_experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, base: nn.Module) -> Tensor:
        """(T, D), (T, K), (T, K) → (T, D): Σ_k g_k FFN_{e_k}(x). `base` holds the bias-free dense projections."""
        top_k = top_k_index.shape[1]
        expert_S = top_k_index.flatten()
        x_SD = hidden_states.repeat_interleave(top_k, dim=0)

        pre = []
        for name in self.form.inputs:
            once_per_token = getattr(base, name)(hidden_states).repeat_interleave(top_k, dim=0)
            pre.append(self._with_bias(name, once_per_token + self.deltas[name](x_SD, expert_S), expert_S))
        h_SF = self.form.hidden(pre, getattr(base, self.form.activation))
        h_SF = h_SF * top_k_weights.flatten()[:, None].to(h_SF.dtype)

        name = self.form.output
        y_SD = self.deltas[name](h_SF, expert_S)
        if name in self.biases_EO:
            y_SD = y_SD + self.biases_EO[name][expert_S] * top_k_weights.flatten()[:, None].to(y_SD.dtype)
        y_TD = getattr(base, name)(h_SF.unflatten(0, (-1, top_k)).sum(1)) + y_SD.unflatten(0, (-1, top_k)).sum(1)
        return y_TD.to(hidden_states.dtype)

    def _with_bias(self, name: str, y_SO: Tensor, expert_S: Tensor) -> Tensor:
        return y_SO + self.biases_EO[name][expert_S] if name in self.biases_EO else y_SO
