import pytest
import torch

from ders.kernels import grouped_linear, grouped_linear_oracle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("counts", "out_features", "in_features"),
    [([2, 0, 5], 8, 12), ([0, 0, 3], 4, 4), ([1], 5, 7), ([3, 4], 9, 4), ([0, 0], 4, 8)],
)
def test_values_and_gradients_match_the_oracle(
    counts: list[int], out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), in_features, dtype=dtype)
    weight = torch.randn(len(counts), out_features, in_features, dtype=dtype)
    upstream = torch.randn(sum(counts), out_features, dtype=dtype)
    results = []
    for function in (grouped_linear, grouped_linear_oracle):
        x_SI, weight_EOI = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y_SO = function(x_SI, torch.tensor(counts), weight_EOI)
        y_SO.backward(upstream)
        results.append((y_SO.detach(), x_SI.grad, weight_EOI.grad))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)
