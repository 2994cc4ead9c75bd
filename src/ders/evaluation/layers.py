"""The layers that are measured, filled with weights as training leaves them, and their float64 oracle.

T tokens, D model width, F hidden width of the FFN, E experts, K top-k, O/I out/in features.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PhiConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP

from ders.deltas import Delta, LowRankDelta, QuantizedDelta, SparseDelta
from ders.evaluation.synthetic import DELTA_SCALE
from ders.kernels import stable_hash
from ders.moe import FFN, MoELayer, SharedBaseMoE, TopKRouter, VanillaMoE
from ders.upcycling import FAMILIES

SM, LM, SPARSE, TWO_BITS = "SM 0.9999", "LM 1", "sparse 0.9", "2-bit"
METHODS: dict[str, Callable[..., Delta]] = {
    SM: functools.partial(SparseDelta, sparsity=0.9999),
    LM: functools.partial(LowRankDelta, rank=1),
    SPARSE: functools.partial(SparseDelta, sparsity=0.9),
    TWO_BITS: functools.partial(QuantizedDelta, bits=2),
}
THIN, THICK = (SM, LM), (SPARSE, TWO_BITS)


@dataclass(frozen=True)
class Shape:
    """An FFN: SwiGLU as Llama's, or with `gated=False` GELU with biases as Phi's."""

    hidden: int
    ffn: int
    gated: bool = True

    @property
    def name(self) -> str:
        return f"{self.hidden}×{self.ffn} {'SwiGLU' if self.gated else 'GELU with biases'}"

    @property
    def form(self) -> FFN:
        return FAMILIES["llama" if self.gated else "phi"].ffn

    def dense(self) -> nn.Module:
        """The Hugging Face MLP module with torch's initial weights."""
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.ffn}
        return LlamaMLP(LlamaConfig(**sizes)) if self.gated else PhiMLP(PhiConfig(**sizes))


@dataclass(frozen=True)
class Mixture:
    """How many experts stand beside each other (E), and how many a token meets (K)."""

    experts: int = 4
    top_k: int = 2

    @property
    def name(self) -> str:
        return f"E {self.experts}, top-{self.top_k}"


def vanilla_layer(dense: nn.Module, shape: Shape, mixture: Mixture) -> VanillaMoE:
    """E copies of the FFN, each moved by noise of 2 % of the weights' standard deviation."""
    layer = VanillaMoE(copy.deepcopy(dense), shape.form, TopKRouter(shape.hidden, mixture.experts, mixture.top_k))
    perturb_(layer)
    return layer.to(_like(dense))


def shared_layer(dense: nn.Module, shape: Shape, mixture: Mixture, make: Callable[..., Delta]) -> SharedBaseMoE:
    """The FFN as shared base with filled deltas, over weights of its own: nothing is warm from another layer's run."""

    def delta(name: str, num_experts: int, out_features: int, in_features: int) -> Delta:
        return make(num_experts, out_features, in_features, seed=stable_hash(0, name))

    router = TopKRouter(shape.hidden, mixture.experts, mixture.top_k)
    layer = SharedBaseMoE(copy.deepcopy(dense), shape.form, router, delta)
    fill_(layer)
    return layer.to(_like(dense))


def _like(module: nn.Module) -> Tensor:
    return next(module.parameters())


@torch.no_grad()
def perturb_(layer: VanillaMoE) -> None:
    """Move every expert's weights by normal noise, 2 % of their standard deviation."""
    for weight_EOI in layer.experts.weights_EOI.values():
        scale = DELTA_SCALE * float(weight_EOI[0].std())
        for weight_OI in weight_EOI:
            weight_OI.add_(torch.randn_like(weight_OI), alpha=scale)


@torch.no_grad()
def fill_(layer: SharedBaseMoE) -> None:
    """Give every delta normal values of 2 % of its base's standard deviation.

    Raises:
        TypeError: a form of delta that is not among those measured.
    """
    for name, delta in layer.experts.deltas.items():
        weight_OI: Tensor = getattr(layer, name).weight
        scale = DELTA_SCALE * float(weight_OI.std())
        if isinstance(delta, SparseDelta):
            delta.values_EN.normal_(std=scale)
        elif isinstance(delta, LowRankDelta):
            # An entry of B A sums `rank` products.
            delta.b_EOR.normal_(std=scale / (delta.rank**0.5 * float(delta.a_ERI.std())))
        elif isinstance(delta, QuantizedDelta):
            for expert in range(delta.num_experts):
                delta.fit_expert_(expert, torch.randn_like(weight_OI, dtype=torch.float32) * scale)
        else:
            raise TypeError(f"cannot fill a {type(delta).__name__}")


def tokens_and_gradient(tokens: int, hidden: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Random hidden states (T, D) and a gradient of the output, both of unit variance, the same for one T and D."""
    drawn = torch.randn(2, tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(like)
    return drawn[0].clone(), drawn[1].clone()


def oracle(layer: MoELayer, x_TD: Tensor, index_TK: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ_k g_k FFN_{e_k}(x) expert by expert on built weights W_e, for the given choices; differentiable."""
    probs_TE = layer.router(x_TD).probs_TE
    gates_TK = probs_TE.gather(1, index_TK)
    if layer.router.preserves_function:
        gates_TK = gates_TK / gates_TK.sum(1, keepdim=True)
    form, y_TD = layer.experts.form, torch.zeros_like(x_TD)
    for expert in range(layer.experts.num_experts):
        token_S, choice_S = torch.where(index_TK == expert)

        def project(name: str, x_SI: Tensor, expert: int = expert) -> Tensor:
            biases_EO = layer.experts.biases_EO
            bias_O = biases_EO[name][expert] if name in biases_EO else None
            return F.linear(x_SI, layer.effective_weight(name, expert), bias_O)

        h_SF = form.hidden([project(name, x_TD[token_S]) for name in form.inputs], activation)
        y_SD = project(form.output, h_SF) * gates_TK[token_S, choice_S, None]
        y_TD = y_TD.index_add(0, token_S, y_SD)
    return y_TD


def in_float64(module: nn.Module) -> Any:
    return copy.deepcopy(module).double()


def relative_error(given: list[Tensor], exact: list[Tensor]) -> float:
    """Frobenius norm of the difference over that of the exact tensors, all taken as one vector."""
    apart = sum(float((g.double() - e).square().sum()) for g, e in zip(given, exact, strict=True))
    return (apart / sum(float(e.square().sum()) for e in exact)) ** 0.5
