"""mix_sparse and its gradients against a float64 oracle that builds every expert's matrices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

CASES = {
    # tokens, top_k, experts, in, hidden, out, kept per matrix, input projections, gated, activation, biases
    "two projections": (5, 2, 3, 9, 37, 11, 40, 2, True, "silu", True),
    "one fused": (3, 3, 4, 7, 21, 5, 60, 1, True, "gelu", False),
    "one plain": (1, 1, 2, 6, 35, 40, 100, 1, False, "gelu_tanh", True),
    "one expert, every entry": (2, 1, 1, 5, 16, 4, 64, 2, True, "relu", False),
    "hardly an entry": (4, 2, 5, 8, 33, 9, 1, 2, True, "silu", False),
    "a full tile": (35, 2, 3, 20, 70, 66, 90, 2, True, "silu", True),
}


@pytest.mark.parametrize("many_tokens", [1, 1000], ids=["tokens last", "tokens first"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(
    case: tuple[Any, ...],
    many_tokens: int,
    dtype: torch.dtype,
    device: str,
    kernels: Any,
    agree: Callable[..., None],
    route: Callable[..., Any],
    make_entries: Callable[..., Any],
    build: Callable[..., Any],
    mix_oracle: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ders.kernels.triton import sparse_mix

    monkeypatch.setattr(sparse_mix, "MANY_TOKENS", many_tokens)
    tokens, top_k, experts, features, hidden, out, kept, inputs, gated, activation, with_biases = case
    width = hidden * (2 if gated and inputs == 1 else 1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    index, gates = route(tokens, top_k, experts)
    x, pre = random(tokens, features), [random(tokens, width) for _ in range(inputs)]
    biases = [random(experts, width) for _ in range(inputs)] if with_biases else []
    shapes = [(width, features)] * inputs + [(out, hidden)]
    entries = [make_entries(experts, *shape, min(kept, shape[0] * shape[1]), dtype) for shape in shapes]
    values, columns, row_starts = (list(parts) for parts in zip(*entries, strict=True))
    arguments = (x, pre, index, gates, values, columns, row_starts, biases, activation, gated)
    found = kernels.mix_sparse(*arguments)
    grads = [random(*result.shape) for result in found]
    d_x, d_pre, d_gates, d_values, d_biases = kernels.mix_sparse_backward(*grads, *arguments)
    assert d_gates.dtype == gates.dtype

    leaves = [t.double().requires_grad_() for t in (x, *pre, gates, *values, *biases)]
    leaf = iter(leaves)
    x64, pre64, gates64 = next(leaf), [next(leaf) for _ in pre], next(leaf)
    values64, biases64 = [next(leaf) for _ in values], list(leaf)
    matrices = [
        build(v, c, s, shape[1])[index] for v, c, s, shape in zip(values64, columns, row_starts, shapes, strict=True)
    ]
    added = [torch.einsum("tkci,ti->tkc", m, x64) for m in matrices[:-1]]
    if biases64:
        added = [a + bias[index] for a, bias in zip(added, biases64, strict=True)]
    expected = mix_oracle(pre64, added, gates64, matrices[-1], activation, gated)
    agree(found, [y.detach() for y in expected], dtype)
    wanted = torch.autograd.grad(expected, leaves, [g.double() for g in grads])
    agree([d_x, *d_pre, d_gates, *d_values, *d_biases], wanted, dtype)


def test_kept_transpositions_and_longer_sums_change_nothing(
    device: str,
    kernels: Any,
    route: Callable[..., Any],
    make_entries: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ders.kernels.triton import common

    tokens, experts, features, hidden = 130, 2, 6, 10
    index, gates = route(tokens, 1, experts)
    x, pre = torch.randn(tokens, features, device=device), torch.randn(tokens, hidden, device=device)
    entries = [make_entries(experts, *shape, 20, x.dtype) for shape in ((hidden, features), (features, hidden))]
    values, columns, row_starts = (list(parts) for parts in zip(*entries, strict=True))
    arguments = (pre, x, x, [pre], index, gates, values, columns, row_starts, [], "silu", False)
    apart = kernels.mix_sparse_backward(*arguments)
    monkeypatch.setattr(common, "PROGRAMS", 1)
    kept = [
        kernels.transpose_entries(c, s, width)
        for c, s, width in zip(columns, row_starts, (features, hidden), strict=True)
    ]
    torch.testing.assert_close(kernels.mix_sparse_backward(*arguments, kept), apart, rtol=1e-5, atol=1e-5)


def test_no_tokens(device: str, kernels: Any, make_entries: Callable[..., Any]) -> None:
    x, pre, index = torch.ones(0, 5, device=device), torch.ones(0, 8, device=device), torch.ones(0, 2, device=device)
    entries = [make_entries(3, *shape, 4, x.dtype) for shape in ((8, 5), (7, 8))]
    values, columns, row_starts = (list(parts) for parts in zip(*entries, strict=True))
    arguments = (x, [pre], index.long(), index, values, columns, row_starts, [], "silu", False)
    found = kernels.mix_sparse(*arguments)
    assert [tuple(y.shape) for y in found] == [(0, 8), (0, 7)]
    *_, d_values, _ = kernels.mix_sparse_backward(*found, *arguments)
    assert not any(d.any() for d in d_values)
