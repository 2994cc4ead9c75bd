"""Experts: functions of (hidden states, chosen experts, gate weights), as Hugging Face's experts are.

T tokens, D model width, F hidden width of the FFN, E experts, K top-k, S = T·K slots (a token and one of its choices),
O/I out/in features of a projection.
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ders.deltas import Delta
from ders.kernels import (
    Form,
    Neurons,
    can_mix,
    can_mix_slots,
    grouped_linear,
    mix_experts,
    mix_neurons,
    mix_slots,
    name_activation,
    synthesized_linear,
)
from ders.kernels.autocast import cast_for_matmul
from ders.moe.execution import COSTS, EXECUTIONS, Work, mixing_pays, synthesis_pays
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

        def project(name: str, x_SI: Tensor, counts_E: Tensor) -> Tensor:
            return grouped_linear(x_SI, counts_E, self.weights_EOI[name])

        return sorted_by_expert(
            hidden_states,
            top_k_index,
            top_k_weights,
            project,
            self.biases_EO,
            self.form,
            self.activation,
            self.num_experts,
        )


def sorted_by_expert(
    x_TD: Tensor,
    index_TK: Tensor,
    gates_TK: Tensor,
    project: Callable[[str, Tensor, Tensor], Tensor],
    biases_EO: nn.ParameterDict,
    form: FFN,
    activation: Callable[[Tensor], Tensor],
    num_experts: int,
) -> Tensor:
    """(T, D), (T, K), (T, K) → (T, D): every slot through its expert, slots of one expert side by side.

    Args:
        project: (name, rows (S, I) sorted by expert, how many each expert has (E,)) → (S, O).
    """
    order_S = index_TK.flatten().argsort(stable=True)
    expert_S = index_TK.flatten()[order_S]
    token_S = order_S // index_TK.shape[1]
    counts_E = expert_S.bincount(minlength=num_experts)

    def apply(name: str, x_SI: Tensor) -> Tensor:
        y_SO = project(name, x_SI, counts_E)
        return y_SO + biases_EO[name][expert_S] if name in biases_EO else y_SO

    x_SD = x_TD[token_S]
    h_SF = form.hidden([apply(name, x_SD) for name in form.inputs], activation)
    y_SD = apply(form.output, h_SF) * gates_TK.flatten()[order_S, None].to(h_SF.dtype)
    return torch.zeros_like(x_TD).index_add(0, token_S, y_SD.to(x_TD.dtype))


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
        self.shapes = [(linear.out_features, linear.in_features) for linear in linears.values()]
        self.biases_EO = expert_biases(linears, num_experts)
        # None: none of those that are compiled in. Its module is the layer's, under its dense name.
        self.activation_name = name_activation(getattr(dense, form.activation))
        self.execution = "auto"
        self._known_ways: dict[tuple[int, int, str], tuple[bool, bool]] = {}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, base: nn.Module) -> Tensor:
        """(T, D), (T, K), (T, K) → (T, D): Σ_k g_k FFN_{e_k}(x). `base` holds the bias-free dense projections."""
        arguments = (hidden_states, top_k_index, top_k_weights, base)
        known = [self._delta(name).form() for name in self.form.projections]
        whole = [form for form in known if isinstance(form, Neurons)]
        if len(whole) == len(known) and self._beside_the_base(whole):
            return self._by_neurons(*arguments, whole)
        forms = [form for form in known if not (form is None or isinstance(form, Neurons))]
        if len(forms) < len(known):
            return self._by_slots(*arguments)
        synthesize, mix = self._ways(top_k_index, forms)
        if self.execution == "synthesize" or (self.execution == "auto" and synthesize):
            return self._synthesized(*arguments, forms)
        mixable = can_mix(hidden_states.device.type, _matmul_dtype(hidden_states), forms, self.activation_name)
        return self._mixed(*arguments, forms) if mix and mixable else self._by_slots(*arguments)

    def _ways(self, index_TK: Tensor, forms: list[Form]) -> tuple[bool, bool]:
        """Whether synthesis pays for so many tokens, and mixing. Found once: for one token it would take its time."""
        (tokens, top_k), device = index_TK.shape, index_TK.device.type
        if torch.compiler.is_compiling() or (tokens, top_k, device) not in self._known_ways:
            work, costs = Work(tokens, top_k, self.num_experts, self.shapes), COSTS.get(device, COSTS["cpu"])
            found = synthesis_pays(work, forms, costs), mixing_pays(work, forms, costs)
            if torch.compiler.is_compiling():
                return found
            self._known_ways[tokens, top_k, device] = found
        return self._known_ways[tokens, top_k, device]

    def _beside_the_base(self, forms: list[Neurons]) -> bool:
        """Whether an expert's activations are the base's but for its neurons: matrices share them, no bias differs."""
        if any(name in self.biases_EO for name in self.form.inputs):
            return False
        return all(form.drawn_from == forms[0].drawn_from for form in forms)

    def _by_neurons(
        self, x_TD: Tensor, index_TK: Tensor, gates_TK: Tensor, base: nn.Module, forms: list[Neurons]
    ) -> Tensor:
        """The dense FFN, and beside it the neurons in which experts differ."""
        pre = [getattr(base, name)(x_TD) for name in self.form.inputs]
        hidden = functools.partial(self.form.hidden, activation=getattr(base, self.form.activation))
        gates_TE = self._by_expert(index_TK, gates_TK)
        mixed_TF, y_TD = mix_neurons(x_TD, pre, gates_TE, forms, hidden, self.activation_name, self.form.gated)
        return self._output(base, mixed_TF, y_TD, index_TK, gates_TK).to(x_TD.dtype)

    def _by_expert(self, index_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Each expert's gate (T, E), zero where it was not chosen."""
        return gates_TK.new_zeros(len(gates_TK), self.num_experts).scatter_add(1, index_TK, gates_TK)

    def _delta(self, name: str) -> Delta:
        delta = self.deltas[name]
        assert isinstance(delta, Delta)
        return delta

    def _synthesized(
        self, x_TD: Tensor, index_TK: Tensor, gates_TK: Tensor, base: nn.Module, forms: list[Form]
    ) -> Tensor:
        """Each expert's weight, built piece by piece and used at once."""
        of = dict(zip(self.form.projections, forms, strict=True))

        def project(name: str, x_SI: Tensor, counts_E: Tensor) -> Tensor:
            return synthesized_linear(x_SI, counts_E, getattr(base, name).weight, of[name])

        activation = getattr(base, self.form.activation)
        return sorted_by_expert(
            x_TD, index_TK, gates_TK, project, self.biases_EO, self.form, activation, self.num_experts
        )

    def _mixed(self, x_TD: Tensor, index_TK: Tensor, gates_TK: Tensor, base: nn.Module, forms: list[Form]) -> Tensor:
        """Deltas, activation and gates in one pass between the two base products."""
        assert self.activation_name is not None
        pre = [getattr(base, name)(x_TD) for name in self.form.inputs]
        biases = [self.biases_EO[name] for name in self.form.inputs if name in self.biases_EO]
        mixed_TF, y_TD = mix_experts(
            x_TD, pre, index_TK, gates_TK, forms, biases, self.activation_name, self.form.gated
        )
        return self._output(base, mixed_TF, y_TD, index_TK, gates_TK).to(x_TD.dtype)

    def _output(
        self, base: nn.Module, mixed_TF: Tensor, delta_TD: Tensor, index_TK: Tensor, gates_TK: Tensor
    ) -> Tensor:
        """The base's output once per token, and what deltas and biases add to it."""
        y_TD: Tensor = getattr(base, self.form.output)(mixed_TF) + delta_TD
        if self.form.output in self.biases_EO:
            bias_EO = self.biases_EO[self.form.output]
            y_TD = y_TD + self._by_expert(index_TK, gates_TK).to(bias_EO.dtype) @ bias_EO
        return y_TD

    def _by_slots(self, x_TD: Tensor, index_TK: Tensor, gates_TK: Tensor, base: nn.Module) -> Tensor:
        """Any delta, by its own `forward` over all slots."""
        top_k, expert_S = index_TK.shape[1], index_TK.flatten()
        x_SD = x_TD.repeat_interleave(top_k, dim=0)
        pre = [getattr(base, name)(x_TD) for name in self.form.inputs]
        slots = [self.deltas[name](x_SD, expert_S) for name in self.form.inputs]
        if self.activation_name is not None and can_mix_slots(x_TD.device.type, pre[0].dtype, self.activation_name):
            biases = [self.biases_EO[name] for name in self.form.inputs if name in self.biases_EO]
            mixed_TF, h_SF = mix_slots(pre, slots, index_TK, gates_TK, biases, self.activation_name, self.form.gated)
        else:
            parts = zip(self.form.inputs, pre, slots, strict=True)
            own = [self._with_bias(name, p.repeat_interleave(top_k, dim=0) + slot, expert_S) for name, p, slot in parts]
            h_SF = self.form.hidden(own, getattr(base, self.form.activation))
            h_SF = h_SF * gates_TK.flatten()[:, None].to(h_SF.dtype)
            mixed_TF = h_SF.unflatten(0, (-1, top_k)).sum(1)
        y_SD = self.deltas[self.form.output](h_SF, expert_S)
        return self._output(base, mixed_TF, y_SD.unflatten(0, (-1, top_k)).sum(1), index_TK, gates_TK).to(x_TD.dtype)

    def _with_bias(self, name: str, y_SO: Tensor, expert_S: Tensor) -> Tensor:
        return y_SO + self.biases_EO[name][expert_S] if name in self.biases_EO else y_SO


def _matmul_dtype(x: Tensor) -> torch.dtype:
    return cast_for_matmul(x)[0].dtype


def set_execution(model: nn.Module, execution: str) -> int:
    """How experts over a shared base run from here on: `auto`, `shared` or `synthesize`; returns how many layers do.

    Raises:
        ValueError: there is no such way.
    """
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}: got {execution!r}")
    found = [module for module in model.modules() if isinstance(module, SharedBaseExperts)]
    for experts in found:
        experts.execution = execution
    return len(found)
