"""The layers against an oracle that builds every W_e and walks over tokens."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ders.deltas import Delta, LowRankDelta, SparseDelta
from ders.moe import FFN, MoELayer, SharedBaseMoE, TopKRouter, VanillaMoE, take_routings

D, F = 20, 28


class Gated(nn.Module):
    form = FFN(("gate", "up"), "down", "act")

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, F, bias), nn.Linear(D, F, bias), nn.Linear(F, D, bias)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Fused(nn.Module):
    form = FFN(("gate_up",), "down", "act")

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down, self.act = nn.Linear(D, 2 * F, False), nn.Linear(F, D, False), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.act(gate) * up)


class Plain(nn.Module):
    form = FFN(("fc1",), "fc2", "act", gated=False)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(D, F), nn.Linear(F, D), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


FFNS = {"gated": Gated, "gated_with_bias": functools.partial(Gated, True), "fused": Fused, "plain": Plain}
DELTAS: dict[str, Any] = {
    "vanilla": None,
    "sparse": functools.partial(SparseDelta, sparsity=0.9),
    "thin": functools.partial(SparseDelta, sparsity=0.99),
    "low_rank": functools.partial(LowRankDelta, rank=3),
}


def build(ffn: str, delta: str, top_k: int = 2, universal: bool = False, trained: bool = True) -> tuple[Any, MoELayer]:
    torch.manual_seed(0)
    dense = FFNS[ffn]()
    router = TopKRouter(D, 4, top_k, seed=3)
    made = DELTAS[delta]

    def make_delta(name: str, *shape: int) -> Delta:
        return made(*shape, seed=len(name))

    source = copy.deepcopy(dense)
    layer = (
        VanillaMoE(source, dense.form, router, universal=universal)
        if made is None
        else SharedBaseMoE(source, dense.form, router, make_delta, universal=universal)
    )
    if trained:
        for parameter in layer.experts.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return dense, layer


def oracle(dense: Any, layer: MoELayer, x_TD: torch.Tensor) -> torch.Tensor:
    routing = layer.router(x_TD)
    rows = []
    for token, x in enumerate(x_TD):
        y = torch.zeros_like(x) if layer.universal is None else layer.universal(x)
        for expert, gate in zip(routing.top_k_index_TK[token].tolist(), routing.top_k_weights_TK[token], strict=True):

            def project(name: str, value: torch.Tensor, expert: int = expert) -> torch.Tensor:
                result = layer.effective_weight(name, expert) @ value
                biases = layer.experts.biases_EO
                return result + biases[name][expert] if name in biases else result

            hidden = dense.form.hidden([project(name, x) for name in dense.form.inputs], dense.act)
            y = y + gate.to(x.dtype) * project(dense.form.output, hidden)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("universal", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("ffn", FFNS)
def test_values_and_all_gradients_match_the_oracle(ffn: str, delta: str, top_k: int, universal: bool) -> None:
    dense, layer = build(ffn, delta, top_k, universal)
    layer = layer.double()
    x = torch.randn(13, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(13, D, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    fast, slow = layer(x), oracle(dense.double(), layer, x)
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-12)
    grads = [torch.autograd.grad(y, inputs, upstream, allow_unused=True, materialize_grads=True) for y in (fast, slow)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("delta", DELTAS)
def test_fp32_error_is_within_twice_the_dense_ffns_own(delta: str) -> None:
    dense, layer = build("gated", delta)
    x = torch.randn(50, D)
    exact = copy.deepcopy(layer).double()(x.double())
    error = (layer(x) - exact).norm() / exact.norm()
    dense_exact = copy.deepcopy(dense).double()(x.double())
    dense_error = (dense(x) - dense_exact).norm() / dense_exact.norm()
    assert error <= max(1e-6, 2 * dense_error)


@pytest.mark.parametrize("delta", ["sparse", "thin", "low_rank"])
def test_no_expert_weight_is_ever_built(delta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = build("gated", delta)

    def refuse(*_: object) -> None:
        raise AssertionError("W_base + Δ_e was built")

    monkeypatch.setattr(SparseDelta, "dense", refuse)
    monkeypatch.setattr(LowRankDelta, "dense", refuse)
    calls = []
    for name in layer.form.projections:
        getattr(layer, name).register_forward_hook(lambda module, args, _: calls.append(len(args[0])))
    layer(torch.randn(13, D)).sum().backward()
    assert calls == [13, 13, 13]  # the base runs once per token, not once per choice


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("delta", DELTAS)
def test_on_a_gpu(delta: str, dtype: torch.dtype) -> None:
    _, layer = build("gated", delta)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(50, D, dtype=torch.float64)
    device_layer = layer.to("cuda", dtype)
    y = device_layer(x.to("cuda", dtype))
    y.float().sum().backward()
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert (y.cpu().double() - exact(x)).norm() <= bound * exact(x).norm()
    assert all(p.grad is not None for p in device_layer.parameters())


def test_dropped_choices_add_nothing() -> None:
    dense, layer = build("plain", "sparse")
    layer.router = TopKRouter(D, 4, 2, capacity_factor=0.25, seed=3)
    layer = layer.double()
    x = torch.randn(16, D, dtype=torch.float64)
    y = layer(x)
    dropped = layer.last_routing.top_k_weights_TK.sum(-1) == 0
    assert dropped.any()
    assert not y[dropped].any()
    torch.testing.assert_close(y, oracle(dense.double(), layer, x))


@pytest.mark.parametrize("delta", DELTAS)
def test_keeps_shape_and_dtype(delta: str) -> None:
    _, layer = build("fused", delta)
    assert layer(torch.randn(2, 5, D)).shape == (2, 5, D)
    assert layer.to(torch.bfloat16)(torch.randn(2, 5, D).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert build("fused", delta)[1](torch.randn(3, D)).shape == (3, D)


def test_the_routing_is_kept_until_taken_and_never_copied() -> None:
    _, layer = build("gated", "sparse")
    layer(torch.randn(4, D))
    assert copy.deepcopy(layer).last_routing is None  # and no error: a graph cannot be copied
    assert take_routings(layer)[""].probs_TE.shape == (4, 4)
    assert take_routings(layer) == {}


@pytest.mark.parametrize("delta", DELTAS)
def test_activation_checkpointing_keeps_all_gradients(delta: str) -> None:
    _, layer = build("gated", delta)
    x = torch.randn(9, D)
    grads = []
    for again in (False, True):
        layer.zero_grad()
        y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        routing = layer.last_routing
        (y.square().sum() + layer.router.loss(routing)).backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*grads)


def test_a_module_of_another_form_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Plain is not an FFN of the expected form.*expected linear layers \['gate'"):
        VanillaMoE(Plain(), Gated.form, TopKRouter(D, 4, 2))
