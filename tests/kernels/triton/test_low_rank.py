"""mix_low_rank and its gradients against a float64 oracle that builds every expert's matrices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

CASES = {
    # tokens, top_k, experts, rank, hidden, input projections, gated, activation, biases
    "two projections": (5, 2, 3, 3, 37, 2, True, "silu", True),
    "one fused": (3, 3, 4, 2, 21, 1, True, "gelu", False),
    "one plain": (1, 1, 2, 1, 33, 1, False, "gelu_tanh", True),
    "one expert": (2, 1, 1, 4, 16, 2, True, "relu", False),
    "many pairs": (3, 2, 5, 20, 17, 2, True, "silu", True),
    "a full tile": (35, 2, 3, 4, 70, 2, True, "silu", False),
    "three choices, a full tile, fused": (17, 3, 3, 5, 66, 1, True, "identity", True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(
    case: tuple[Any, ...],
    dtype: torch.dtype,
    device: str,
    kernels: Any,
    agree: Callable[..., None],
    route: Callable[..., Any],
    mix_oracle: Callable[..., Any],
) -> None:
    tokens, top_k, experts, rank, hidden, inputs, gated, activation, with_biases = case
    columns = hidden * (2 if gated and inputs == 1 else 1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    index, gates = route(tokens, top_k, experts)
    pre = [random(tokens, columns) for _ in range(inputs)]
    z = [random(tokens, experts * rank) for _ in range(inputs)]
    b = [random(experts, columns, rank) for _ in range(inputs)]
    a_out = random(experts, rank, hidden)
    biases = [random(experts, columns) for _ in range(inputs)] if with_biases else []
    arguments = (pre, z, index, gates, b, a_out, biases, activation, gated)
    found = kernels.mix_low_rank(*arguments)
    grads = [random(*result.shape) for result in found]
    d_pre, d_z, d_gates, d_b, d_a_out, d_biases = kernels.mix_low_rank_backward(*grads, *arguments)
    assert d_gates.dtype == gates.dtype

    leaves = [t.double().requires_grad_() for t in (*pre, *z, gates, *b, a_out, *biases)]
    leaf = iter(leaves)
    pre64, z64 = [next(leaf) for _ in pre], [next(leaf) for _ in z]
    gates64, b64, a64, biases64 = next(leaf), [next(leaf) for _ in b], next(leaf), list(leaf)
    token = torch.arange(tokens, device=device)[:, None]
    added = [
        torch.einsum("tkcr,tkr->tkc", b_j[index], z_j.unflatten(1, (experts, rank))[token, index])
        for b_j, z_j in zip(b64, z64, strict=True)
    ]
    if biases64:
        added = [a + bias[index] for a, bias in zip(added, biases64, strict=True)]
    # A_out,e in the rows of its expert: what the oracle writes is then z_out.
    own = torch.eye(experts, device=device, dtype=torch.float64)[index]
    a_TKOF = torch.einsum("tke,tkrf->tkerf", own, a64[index]).flatten(2, 3)
    expected = mix_oracle(pre64, added, gates64, a_TKOF, activation, gated)
    agree(found, [x.detach() for x in expected], dtype)
    wanted = torch.autograd.grad(expected, leaves, [g.double() for g in grads])
    agree([*d_pre, *d_z, d_gates, *d_b, d_a_out, *d_biases], wanted, dtype)


def test_a_program_may_take_several_tiles_of_tokens(
    device: str, kernels: Any, route: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ders.kernels.triton import common

    tokens, experts, rank, hidden = 100, 2, 3, 20
    index, gates = route(tokens, 2, experts)
    pre, z = torch.randn(tokens, hidden, device=device), torch.randn(tokens, experts * rank, device=device)
    b, a_out = torch.randn(experts, hidden, rank, device=device), torch.randn(experts, rank, hidden, device=device)
    arguments = (pre, z, [pre], [z], index, gates, [b], a_out, [], "silu", False)
    apart = kernels.mix_low_rank_backward(*arguments)
    monkeypatch.setattr(common, "PROGRAMS", 1)
    together = kernels.mix_low_rank_backward(*arguments)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_no_tokens(device: str, kernels: Any) -> None:
    pre, z, index = torch.ones(0, 8, device=device), torch.ones(0, 6, device=device), torch.ones(0, 2, device=device)
    b, a_out = torch.ones(3, 8, 2, device=device), torch.ones(3, 2, 8, device=device)
    arguments = ([pre], [z], index.long(), index, [b], a_out, [], "silu", False)
    found = kernels.mix_low_rank(*arguments)
    assert [tuple(x.shape) for x in found] == [(0, 8), (0, 6)]
    *_, d_b, d_a_out, _ = kernels.mix_low_rank_backward(*found, *arguments)
    assert not d_b[0].any()
    assert not d_a_out.any()


def test_an_unknown_activation(device: str, kernels: Any) -> None:
    with pytest.raises(ValueError, match="activation must be one of silu, "):
        kernels.mix_low_rank([], [], None, None, [], None, [], "softplus", False)
