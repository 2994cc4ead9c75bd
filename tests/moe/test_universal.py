"""The FFN that serves every token: a copy of its own or over the shared base, added or weighted by what gates leave."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

from ders.deltas import Delta, LowRankDelta
from ders.moe import FFN, MoELayer, NoisyMLPRouter, Router, SharedBaseMoE, TopKRouter, VanillaMoE

D, F, E = 6, 10, 3
FORM = FFN(inputs=("up",), output="down", activation="act", gated=False)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, F), nn.Linear(F, D), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


def build(kind: str, universal_weight: str, router: Router) -> MoELayer:
    torch.manual_seed(0)
    dense = Dense()

    def make(name: str, *shape: int) -> Delta:
        return LowRankDelta(*shape, rank=2, seed=len(name))

    options: dict[str, Any] = {"universal": True, "universal_weight": universal_weight}
    layer: MoELayer = (
        VanillaMoE(dense, FORM, router, **options)
        if kind == "vanilla"
        else SharedBaseMoE(copy.deepcopy(dense), FORM, router, make, extended=kind == "extended", **options)
    )
    for parameter in [*layer.experts.parameters(), *(layer.universal.parameters() if layer.universal else ())]:
        parameter.data += 0.1 * torch.randn_like(parameter)
    return layer.double().eval()


def expert_output(layer: MoELayer, expert: int, x: torch.Tensor) -> torch.Tensor:
    biases = layer.experts.biases_EO
    hidden = nn.functional.gelu(layer.effective_weight("up", expert) @ x + biases["up"][expert])
    return layer.effective_weight("down", expert) @ hidden + biases["down"][expert]


def oracle(layer: MoELayer, x_TD: torch.Tensor) -> torch.Tensor:
    routing = layer.router(x_TD)
    rows = []
    for token, x in enumerate(x_TD):
        gates = routing.top_k_weights_TK[token]
        if isinstance(layer, SharedBaseMoE) and layer.extended:
            everywhere = expert_output(layer, E, x)
        else:
            u: Any = layer.universal
            everywhere = u.down.weight @ nn.functional.gelu(u.up.weight @ x + u.up.bias) + u.down.bias
        y = everywhere * (1 - gates.sum() if layer.universal_weight == "complement" else 1)
        for expert, gate in zip(routing.top_k_index_TK[token].tolist(), gates, strict=True):
            y = y + gate * expert_output(layer, expert, x)
        rows.append(y)
    return torch.stack(rows)


ROUTERS = {
    "top_1_with_bias": functools.partial(TopKRouter, D, E, 1, bias=True, seed=1),
    "top_2_raw": functools.partial(TopKRouter, D, E, 2, renormalize=False, seed=1),
    "noisy": functools.partial(NoisyMLPRouter, D, E, 1, seed=1),
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("universal_weight", ["one", "complement"])
@pytest.mark.parametrize("kind", ["vanilla", "shared", "extended"])
def test_values_and_all_gradients_match_the_oracle(kind: str, universal_weight: str, router: str) -> None:
    layer = build(kind, universal_weight, ROUTERS[router]())
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 7, D, dtype=torch.float64)
    inputs = [x, *(p for n, p in layer.named_parameters() if "weight_noise" not in n)]
    actual, expected = layer(x), oracle(layer, x.reshape(-1, D)).view(x.shape)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((actual * upstream).sum(), inputs),
        torch.autograd.grad((expected * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="universal_weight must be one or complement: got 'half'"):
        build("vanilla", "half", ROUTERS["noisy"]())


def test_the_bias_starts_at_zero_and_routes() -> None:
    router = TopKRouter(D, E, 1, bias=True)
    assert router.bias is not None
    assert not router.bias.any()
    router.bias.data[2] = 100.0
    assert (router(torch.randn(5, D)).top_k_index_TK == 2).all()
