"""Grouped products with W + Δ_e, and their gradients, against products with the built matrices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ders.kernels import dequantize, quantize

CODED = [
    # slots of each expert, out, in, bits, grids per matrix
    ([3, 0, 2], 7, 12, 2, 7),
    ([10, 27], 35, 9, 1, 1),
    ([1, 0, 0, 5], 3, 32, 4, 12),
    ([0, 70, 1], 40, 50, 2, 40),
    ([9], 1, 33, 4, 1),
]
SPARSE = [
    # slots of each expert, out, in, kept per matrix
    ([3, 0, 2], 7, 12, 40),
    ([10, 27], 40, 50, 300),
    ([0, 0, 0, 5], 21, 30, 90),
    ([70], 9, 35, 60),
]


@pytest.mark.parametrize("case", CODED)
def test_quantized(
    case: tuple[Any, ...], dtype: torch.dtype, device: str, kernels: Any, agree: Callable[..., None]
) -> None:
    counts, out_features, in_features, bits, groups = case
    expert = torch.repeat_interleave(torch.tensor(counts)).to(device)
    parts = [quantize(torch.randn(out_features, in_features), bits, groups, "uniform", False) for _ in counts]
    codes, lows, steps = (torch.stack(tensors).to(device) for tensors in zip(*parts, strict=True))
    x, weight = (torch.randn(n, in_features).to(device, dtype) for n in (len(expert), out_features))
    form = (torch.tensor(counts, device=device), weight, codes, bits, lows.float(), steps.float())
    found = kernels.synthesized_quantized(x, *form)
    grad = torch.randn(found.shape).to(device, dtype)
    d_x = kernels.synthesized_quantized_backward(grad, *form)

    grids = zip(codes, lows.double(), steps.double(), strict=True)
    built = torch.stack([dequantize(c, bits, in_features, low, step) for c, low, step in grids])
    built = (built + weight.double())[expert]
    expected = torch.einsum("soi,si->so", built, x.double()), torch.einsum("soi,so->si", built, grad.double())
    agree([found, d_x], expected, dtype)


@pytest.mark.parametrize("case", SPARSE)
def test_sparse(
    case: tuple[Any, ...],
    dtype: torch.dtype,
    device: str,
    kernels: Any,
    agree: Callable[..., None],
    make_entries: Callable[..., Any],
    build: Callable[..., Any],
) -> None:
    counts, out_features, in_features, kept = case
    expert = torch.repeat_interleave(torch.tensor(counts)).to(device)
    values, columns, row_starts = make_entries(len(counts), out_features, in_features, kept, dtype)
    x, weight = (torch.randn(n, in_features).to(device, dtype) for n in (len(expert), out_features))
    form = (torch.tensor(counts, device=device), weight, values, columns, row_starts)
    found = kernels.synthesized_sparse(x, *form)
    grad = torch.randn(found.shape).to(device, dtype)
    d_x, d_values = kernels.synthesized_sparse_backward(grad, x, *form)

    x64, values64 = x.double().requires_grad_(), values.double().requires_grad_()
    built = build(values64, columns, row_starts, in_features) + weight.double()
    expected = torch.einsum("soi,si->so", built[expert], x64)
    wanted = torch.autograd.grad(expected, (x64, values64), grad.double())
    agree([found, d_x, d_values], [expected.detach(), *wanted], dtype)
