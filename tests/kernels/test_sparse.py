from collections.abc import Callable

import pytest
import torch

from ders.deltas import SparseDelta
from ders.kernels import sparse
from ders.kernels.native import library

FAST = [sparse._by_gathering, sparse._by_slots_of_each_expert, sparse._by_masks, sparse._native, sparse.sparse_linear]


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize(
    ("slots", "experts", "out_features", "in_features", "sparsity"),
    [(13, 3, 7, 5, 0.6), (1, 4, 5, 9, 0.9), (8, 2, 1, 6, 0.5), (5, 1, 6, 4, 0.0), (3, 5, 4, 4, 0.9)],
)
def test_values_and_gradients_match_the_oracle(
    fast: Callable[..., torch.Tensor], slots: int, experts: int, out_features: int, in_features: int, sparsity: float
) -> None:
    torch.manual_seed(0)
    delta = SparseDelta(experts, out_features, in_features, sparsity=sparsity, seed=3).double()
    expert_S = torch.randint(experts, (slots,))
    results = []
    upstream = torch.randn(slots, out_features, dtype=torch.float64)
    x = torch.randn(slots, in_features, dtype=torch.float64)
    values = torch.randn_like(delta.values_EN)
    for function in (fast, sparse.sparse_linear_oracle):
        x_SI, values_EN = x.clone().requires_grad_(), values.clone().requires_grad_()
        y_SO = function(x_SI, expert_S, values_EN, *delta._derive())
        y_SO.backward(upstream)
        results.append((y_SO.detach(), x_SI.grad, values_EN.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def operands(slots: int, out_features: int, in_features: int, dtype: torch.dtype = torch.float64) -> Operands:
    torch.manual_seed(0)
    delta = SparseDelta(3, out_features, in_features, sparsity=0.7, seed=1)
    x, values = torch.randn(slots, in_features, dtype=dtype), torch.randn(delta.values_EN.shape, dtype=dtype)
    # Expert 1 has no slot.
    return x, 2 * torch.randint(2, (slots,)), values, *delta._derive()


def with_gradients(function: Callable[..., torch.Tensor], parts: Operands) -> list[torch.Tensor]:
    x, values = parts[0].clone().requires_grad_(), parts[2].clone().requires_grad_()
    y = function(x, parts[1], values, *parts[3:])
    torch.manual_seed(1)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    assert values.grad is not None
    return [y.detach(), x.grad, values.grad]


@pytest.mark.parametrize("slots", [0, 1, 2, 7, 15, 40, 75, 140])
@pytest.mark.parametrize(("out_features", "in_features"), [(37, 45), (3, 130), (50, 16)])
def test_any_number_of_slots(slots: int, out_features: int, in_features: int) -> None:
    parts = operands(slots, out_features, in_features)
    found, expected = (with_gradients(f, parts) for f in (sparse.sparse_linear, sparse.sparse_linear_oracle))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("slots", [3, 75])
def test_narrow_types(slots: int, dtype: torch.dtype, tolerance: float) -> None:
    parts = operands(slots, 37, 45, dtype)
    exact = tuple(t.double() if t.is_floating_point() else t for t in parts)
    found, expected = (
        with_gradients(sparse.sparse_linear, parts)[0],
        with_gradients(sparse.sparse_linear_oracle, exact)[0],
    )
    assert found.dtype == dtype
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = operands(13, 37, 45)
    monkeypatch.setattr(library, "library", lambda: None)
    found, expected = (with_gradients(f, parts) for f in (sparse.sparse_linear, sparse.sparse_linear_oracle))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    x, expert, values, *indices = operands(5, 4, 6)
    leaves = x.requires_grad_(), values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, values: sparse.sparse_linear(x, expert, values, *indices), leaves)


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    parts = operands(5, 7, 9)
    compiled = torch.compile(sparse.sparse_linear, fullgraph=True)
    torch.testing.assert_close(with_gradients(compiled, parts), with_gradients(sparse.sparse_linear, parts))


def test_bf16_under_autocast() -> None:
    delta = SparseDelta(2, 6, 4, sparsity=0.5)
    torch.nn.init.normal_(delta.values_EN)
    x, expert = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        y = delta(x, expert)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), delta(x, expert), rtol=0.05, atol=0.05)
