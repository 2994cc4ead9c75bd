"""The layer that takes the place of a dense FFN: router + experts (+ universal FFN).

T tokens, D model width, E experts, K top-k.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ders.deltas import Delta
from ders.moe.experts import SharedBaseExperts, VanillaExperts
from ders.moe.ffn import FFN
from ders.moe.router import Router, Routing

# What multiplies the universal FFN: 1 (Med-MoE), or 1 − Σ_k g_k (XFT).
UNIVERSAL_WEIGHTS = ("one", "complement")


class MoELayer(nn.Module):
    """Σ_k g_k · FFN_{e_k}(x), plus the weighted universal FFN where there is one. Takes and returns hidden states.

    The last routing stays readable in `last_routing` until it is taken, for the losses and the statistics.

    Args:
        dense: the FFN module this layer replaces; its weights become the experts'.
        form: how that module is built.
        router: decides over the experts; its own E and K are the layer's.
        universal: keep a copy of the dense FFN that serves every token beside the experts.
        universal_weight: what multiplies that copy's output, `one` or `complement` (1 − Σ_k g_k).

    Raises:
        ValueError: an unknown `universal_weight`, or a complement of gates that sum to one.
    """

    experts: VanillaExperts | SharedBaseExperts

    def __init__(
        self, dense: nn.Module, form: FFN, router: Router, *, universal: bool = False, universal_weight: str = "one"
    ) -> None:
        super().__init__()
        if universal_weight not in UNIVERSAL_WEIGHTS:
            raise ValueError(f"universal_weight must be {' or '.join(UNIVERSAL_WEIGHTS)}: got {universal_weight!r}")
        if universal_weight == "complement" and universal and router.preserves_function:
            raise ValueError(
                "universal_weight=complement gives the universal FFN what the gates leave of one, and this router's "
                "gates leave nothing: use top_k=1, renormalize=false, or universal_weight=one"
            )
        self.universal_weight = universal_weight
        self.router = router
        self.universal: nn.Module | None = copy.deepcopy(dense) if universal else None
        self.last_routing: Routing | None = None
        # What the dense FFN counted: everything this layer holds beyond it was added.
        self.num_dense_params = sum(p.numel() for p in dense.parameters())

    def run_experts(self, x_TD: Tensor, routing: Routing) -> Tensor:
        raise NotImplementedError

    def effective_weight(self, name: str, expert: int) -> Tensor:
        """W_e (O, I) of one projection, built: for analysis and export, never for the forward pass."""
        raise NotImplementedError

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The base weights all experts share; empty where they share none."""
        yield from ()

    @property
    def has_universal(self) -> bool:
        """Whether an FFN serves every token, as a copy of its own or over the shared base."""
        return self.universal is not None

    def universal_gates(self, routing: Routing) -> Tensor:
        """What multiplies the universal FFN's output, token by token (T,)."""
        gates_T = routing.top_k_weights_TK.sum(-1)
        return torch.ones_like(gates_T) if self.universal_weight == "one" else 1 - gates_T

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.router(x_TD)
        self.last_routing = routing
        y = self.run_experts(x_TD, routing).view(hidden_states.shape)
        if self.universal is None:
            return y
        everywhere: Tensor = self.universal(hidden_states)
        if self.universal_weight == "complement":
            everywhere = everywhere * self.universal_gates(routing).view(*y.shape[:-1], 1).to(y.dtype)
        return y + everywhere

    def __getstate__(self) -> dict[str, Any]:
        # A routing holds the graph of its step: a copy of the layer must not.
        return {**super().__getstate__(), "last_routing": None}


class VanillaMoE(MoELayer):
    """E full copies of the dense FFN."""

    experts: VanillaExperts

    def __init__(self, dense: nn.Module, form: FFN, router: Router, **universal: Any) -> None:
        super().__init__(dense, form, router, **universal)
        self.experts = VanillaExperts(dense, form, router.num_experts)

    def run_experts(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return self.experts(x_TD, routing.top_k_index_TK, routing.top_k_weights_TK)

    def effective_weight(self, name: str, expert: int) -> Tensor:
        return self.experts.weights_EOI[name][expert]


class SharedBaseMoE(MoELayer):
    """One shared base under the dense names (`gate_proj.weight`, …) and E deltas in `experts`.

    The dense names make a file of this layer readable as the dense model by a loader that knows nothing of deltas.
    With `extended` the universal FFN is expert E, over the same base, and every token's last choice.
    """

    experts: SharedBaseExperts

    def __init__(
        self,
        dense: nn.Module,
        form: FFN,
        router: Router,
        make_delta: Callable[..., Delta],
        *,
        universal: bool = False,
        universal_weight: str = "one",
        extended: bool = False,
    ) -> None:
        super().__init__(dense, form, router, universal=universal and not extended, universal_weight=universal_weight)
        self.extended = extended
        self.experts = SharedBaseExperts(dense, form, router.num_experts + extended, make_delta)
        for name, linear in form.linears(dense).items():
            linear.register_parameter("bias", None)  # every expert has its own from here on
            self.add_module(name, linear)
        setattr(self, form.activation, getattr(dense, form.activation))
        self.form = form

    def run_experts(self, x_TD: Tensor, routing: Routing) -> Tensor:
        index_TK, weights_TK = routing.top_k_index_TK, routing.top_k_weights_TK
        if self.extended:
            index_TK = F.pad(index_TK, (0, 1), value=self.router.num_experts)
            weights_TK = torch.cat([weights_TK, self.universal_gates(routing)[:, None]], dim=1)
        return self.experts(x_TD, index_TK, weights_TK, base=self)

    @property
    def has_universal(self) -> bool:
        return self.extended or super().has_universal

    def effective_weight(self, name: str, expert: int) -> Tensor:
        delta = self.experts.deltas[name]
        assert isinstance(delta, Delta)
        weight_OI: Tensor = getattr(self, name).weight
        return weight_OI + delta.dense(expert).to(weight_OI.device)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        for name in self.form.projections:
            yield getattr(self, name).weight


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """All MoE layers of a model by module name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def take_routings(model: nn.Module) -> dict[str, Routing]:
    """The last routing of every MoE layer that ran, by module name; the layers let go of them."""
    taken = {}
    for name, layer in moe_layers(model).items():
        if layer.last_routing is not None:
            taken[name] = layer.last_routing
            layer.last_routing = None
    return taken
