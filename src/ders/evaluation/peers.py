"""What a vanilla MoE layer costs elsewhere: other libraries' layers over the very weights of ours, and rebuilding W_e.

Libraries that are not there, or do not run here, are named with the reason.

T tokens, D model width, F hidden width of the FFN, E experts, K top-k, O/I out/in features.
"""

import copy
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.integrations.moe import use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from ders.evaluation.layers import Mixture, Shape
from ders.moe import Router, SharedBaseMoE, VanillaMoE

OURS = "vanilla: ours"
# Ways to run the experts of one stacked tensor that transformers offers everywhere.
HUGGING_FACE = ("eager", "batched_mm", "grouped_mm")
# What batched_mm may copy: it gathers the weights of every slot.
MAX_GATHERED_BYTES = 1e9
# These wait for the device, and so cannot be captured in a CUDA graph.
WAITING = ("vanilla: plain loop", "vanilla: HF eager", "vanilla: DeepSpeed", "vanilla: MegaBlocks")


class UnavailableError(Exception):
    """This peer cannot be measured here; the message says why."""


class Routed(nn.Module):
    """Our router before another library's experts."""

    def __init__(self, router: Router, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self.router(x_TD)
        y_TD: Tensor = self.experts(x_TD, routing.top_k_index_TK, routing.top_k_weights_TK)
        return y_TD


class PlainLoop(nn.Module):
    """Expert by expert, as one writes it down: the tokens that chose it through its own dense FFN."""

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(experts)

    def forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.each):
            token_S, choice_S = torch.where(index_TK == number)
            if len(token_S):
                gates_S1 = weights_TK[token_S, choice_S, None].to(x_TD.dtype)
                y_TD = y_TD.index_add(0, token_S, expert(x_TD[token_S]) * gates_S1)
        return y_TD


@use_experts_implementation(has_bias=True, has_gate=False)
class PlainExperts(nn.Module):
    """Experts without a gate and with biases, in the form that transformers' implementations take."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        experts, hidden, ffn = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.num_experts = experts
        self.up_proj = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, ffn))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, ffn))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))
        self.act_fn: Any = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise NotImplementedError("the plain loop stands for it")


def vanilla_peers(
    dense: nn.Module, vanilla: VanillaMoE, shape: Shape, mixture: Mixture
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every vanilla layer there is, ours among them, by name; and of those that are not there, why."""
    found: dict[str, nn.Module] = {OURS: vanilla}
    missing: dict[str, str] = {}
    makers: dict[str, Callable[[], nn.Module]] = {"vanilla: plain loop": lambda: _loop(dense, vanilla, mixture)}
    stacked = _stacked(vanilla, shape, mixture)
    for implementation in HUGGING_FACE:
        makers[f"vanilla: HF {implementation}"] = _implementation(stacked, vanilla, implementation)
    makers["vanilla: DeepSpeed"] = lambda: _DeepSpeed(dense, vanilla, shape, mixture)
    makers["vanilla: ScatterMoE"] = lambda: _scattermoe(vanilla, shape, mixture)
    makers["vanilla: MegaBlocks"] = lambda: _megablocks(vanilla, shape, mixture)
    like = next(dense.parameters())
    for name, make in makers.items():
        try:
            found[name] = make().to(like)
        except (UnavailableError, ImportError) as error:
            missing[name] = str(error)
        except Exception as error:  # another library's own failure is a finding, not ours
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def _loop(dense: nn.Module, vanilla: VanillaMoE, mixture: Mixture) -> nn.Module:
    return Routed(vanilla.router, PlainLoop([_expert(dense, vanilla, e) for e in range(mixture.experts)]))


@torch.no_grad()
def _expert(dense: nn.Module, vanilla: VanillaMoE, expert: int) -> nn.Module:
    """One expert as a dense FFN of its own."""
    module = copy.deepcopy(dense)
    for name, linear in vanilla.experts.form.linears(module).items():
        linear.weight.copy_(vanilla.experts.weights_EOI[name][expert])
        if name in vanilla.experts.biases_EO:
            linear.bias.copy_(vanilla.experts.biases_EO[name][expert])
    return module


@torch.no_grad()
def _stacked(vanilla: VanillaMoE, shape: Shape, mixture: Mixture) -> nn.Module:
    """Hugging Face's experts module over copies of the weights; gate and up are one tensor there."""
    config = MixtralConfig(hidden_size=shape.hidden, intermediate_size=shape.ffn, num_local_experts=mixture.experts)
    with torch.device("meta"):
        experts = MixtralExperts(config) if shape.gated else PlainExperts(config)
    weights, biases = vanilla.experts.weights_EOI, vanilla.experts.biases_EO
    inputs = [weights[name] for name in shape.form.inputs]
    first = "gate_up_proj" if shape.gated else "up_proj"
    setattr(experts, first, nn.Parameter(torch.cat(inputs, dim=1)))
    experts.down_proj = nn.Parameter(weights[shape.form.output].clone())
    if not shape.gated:
        experts.up_proj_bias = nn.Parameter(biases[shape.form.inputs[0]].clone())
        experts.down_proj_bias = nn.Parameter(biases[shape.form.output].clone())
    experts.act_fn = vanilla.experts.activation
    return experts


def _implementation(stacked: nn.Module, vanilla: VanillaMoE, implementation: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        experts = copy.copy(stacked)  # the parameters are shared
        experts.config = copy.deepcopy(stacked.config)
        experts.config._experts_implementation = implementation
        if implementation == "eager" and isinstance(stacked, PlainExperts):
            raise UnavailableError("transformers has no experts of this form: the plain loop does the same")
        return Routed(vanilla.router, experts)

    return make


def gathered_bytes(shape: Shape, mixture: Mixture, tokens: int, dtype: torch.dtype) -> int:
    """What HF batched_mm copies for its largest product: the weights of every slot."""
    columns = 2 * shape.ffn if shape.gated else shape.ffn
    return tokens * mixture.top_k * columns * shape.hidden * dtype.itemsize


class _DeepSpeed(nn.Module):
    """DeepSpeed's layer with its own gate, without drops or noise, on one process."""

    @torch.no_grad()
    def __init__(self, dense: nn.Module, vanilla: VanillaMoE, shape: Shape, mixture: Mixture) -> None:
        super().__init__()
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if mixture.top_k > 2:
            raise UnavailableError("DeepSpeed's gate knows top-1 and top-2")
        moe = importlib.import_module("deepspeed.moe.layer").MoE
        self.layer = moe(
            shape.hidden,
            dense,
            mixture.experts,
            k=mixture.top_k,
            min_capacity=0,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        inner = self.layer.deepspeed_moe
        inner.gate.wg.weight.copy_(vanilla.router.weight)
        for number, expert in enumerate(inner.experts.deepspeed_experts):
            expert.load_state_dict(_expert(dense, vanilla, number).state_dict())

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.layer(x_TD[None])[0][0]
        return y_TD


@torch.no_grad()
def _scattermoe(vanilla: VanillaMoE, shape: Shape, mixture: Mixture) -> nn.Module:
    mlp = importlib.import_module("scattermoe.mlp")
    if not shape.gated:
        raise UnavailableError("ScatterMoE's experts have no biases")
    experts = mlp.GLUMLP(shape.hidden, shape.ffn, mixture.experts, mixture.top_k, vanilla.experts.activation)
    weights = vanilla.experts.weights_EOI
    gate, up = (weights[name] for name in shape.form.inputs)
    experts.experts.weight.copy_(torch.cat([up, gate], dim=1))  # its second half is what the activation sees
    experts.output_experts.weight.copy_(weights[shape.form.output])
    # It takes the gate weights before the choices, and in the dtype of the hidden states.
    return Routed(vanilla.router, _Reordered(lambda x, index, gates: experts(x, gates.to(x.dtype), index), experts))


@torch.no_grad()
def _megablocks(vanilla: VanillaMoE, shape: Shape, mixture: Mixture) -> nn.Module:
    arguments = importlib.import_module("megablocks.layers.arguments")
    dmoe = importlib.import_module("megablocks.layers.dmoe")
    if not shape.gated:
        raise UnavailableError("MegaBlocks' experts have no bias of the first projection each")
    weights = vanilla.experts.weights_EOI
    gate, up = (weights[name] for name in shape.form.inputs)
    experts = dmoe.ParallelDroplessMLP(
        arguments.Arguments(
            hidden_size=shape.hidden,
            ffn_hidden_size=shape.ffn,
            bias=False,
            return_bias=False,
            activation_fn=vanilla.experts.activation,
            moe_num_experts=mixture.experts,
            moe_top_k=mixture.top_k,
            moe_loss_weight=0,
            mlp_type="glu",
            fp16=gate.dtype == torch.float16,
            bf16=gate.dtype == torch.bfloat16,
            device=gate.device,
        )
    )
    experts.mlp.w1.copy_(gate.flatten(0, 1))
    experts.mlp.v1.copy_(up.flatten(0, 1))
    experts.mlp.w2.copy_(weights[shape.form.output].transpose(1, 2).flatten(0, 1))

    def forward(x_TD: Tensor, index_TK: Tensor, gates_TK: Tensor) -> Tensor:
        y: Tensor = experts(x_TD[:, None], gates_TK, gates_TK.to(x_TD.dtype), index_TK)
        return y.view_as(x_TD)

    return Routed(vanilla.router, _Reordered(forward, experts))


class _Reordered(nn.Module):
    """Another library's experts, called with their arguments in their order."""

    def __init__(self, call: Callable[[Tensor, Tensor, Tensor], Tensor], experts: nn.Module) -> None:
        super().__init__()
        self.call, self.experts = call, experts

    def forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.call(x_TD, index_TK, weights_TK)


class Rebuilt(nn.Module):
    """A shared-base layer as the paper runs it: W_e = W + Δ_e is built for every expert hit, in every forward pass."""

    def __init__(self, layer: SharedBaseMoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self.layer.router(x_TD)
        form, y_TD = self.layer.form, torch.zeros_like(x_TD)
        activation = getattr(self.layer, form.activation)
        biases_EO = self.layer.experts.biases_EO

        def project(name: str, x_SI: Tensor, expert: int) -> Tensor:
            bias_O = biases_EO[name][expert] if name in biases_EO else None
            return F.linear(x_SI, self.layer.effective_weight(name, expert), bias_O)

        for expert in routing.top_k_index_TK.unique().tolist():
            token_S, choice_S = torch.where(routing.top_k_index_TK == expert)
            h_SF = form.hidden([project(name, x_TD[token_S], expert) for name in form.inputs], activation)
            gates_S1 = routing.top_k_weights_TK[token_S, choice_S, None].to(h_SF.dtype)
            y_TD = y_TD.index_add(0, token_S, (project(form.output, h_SF, expert) * gates_S1).to(x_TD.dtype))
        return y_TD
