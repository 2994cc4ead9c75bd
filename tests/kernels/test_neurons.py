from typing import Any

import pytest
import torch
from torch import Tensor

from ders.deltas import NeuronDelta
from ders.kernels import mix_neurons, mix_neurons_oracle
from ders.moe import FFN

# Input projections by how often they hold all neurons, and the FFN's form.
LAYOUTS = {
    "gate_and_up": ([1, 1], FFN(("gate", "up"), "down", "act")),
    "fused": ([2], FFN(("both",), "down", "act")),
    "plain": ([1], FFN(("first",), "down", "act", gated=False)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tokens", "neurons"), [(1, 1), (7, 3), (5, 13)])
@pytest.mark.parametrize("one_pass", [False, True])
def test_it_is_the_oracle(layout: str, tokens: int, neurons: int, one_pass: bool) -> None:
    torch.manual_seed(0)
    (blocks, ffn), experts, width, hidden = LAYOUTS[layout], 3, 9, 13
    dials: dict[str, Any] = {"neurons": neurons, "seed": 5}
    deltas = [NeuronDelta(experts, n * hidden, width, blocks=n, **dials).double() for n in blocks]
    deltas.append(NeuronDelta(experts, width - 1, hidden, hidden="columns", **dials).double())
    for delta in deltas:
        torch.nn.init.normal_(delta.values_EMX)
    x = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    pre = [torch.randn(tokens, n * hidden, dtype=torch.float64, requires_grad=True) for n in blocks]
    gates = torch.rand(tokens, experts, dtype=torch.float64)
    gates[0, 1] = 0  # not chosen
    leaves = [x, *pre, gates.requires_grad_(), *(delta.values_EMX for delta in deltas)]

    def act(pre: list[Tensor]) -> Tensor:
        return ffn.hidden(pre, torch.nn.functional.silu)

    how = ("silu" if one_pass else None, ffn.gated)
    fast = mix_neurons(x, pre, gates, [delta.form() for delta in deltas], act, *how)
    slow = mix_neurons_oracle(x, pre, gates, [torch.stack([d.dense(e) for e in range(experts)]) for d in deltas], act)
    upstream = [torch.randn_like(y) for y in slow]
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(result, leaves, upstream) for result in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)
