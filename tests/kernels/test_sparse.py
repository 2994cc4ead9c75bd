from collections.abc import Callable

import pytest
import torch

from ders.deltas import SparseDelta
from ders.kernels import sparse

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


def test_bf16_under_autocast() -> None:
    delta = SparseDelta(2, 6, 4, sparsity=0.5)
    torch.nn.init.normal_(delta.values_EN)
    x, expert = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        y = delta(x, expert)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), delta(x, expert), rtol=0.05, atol=0.05)
