"""quantized_matvec and sparse_matvec against oracles that build every matrix."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ders.kernels import quantize, quantized_linear_oracle, sparse_linear_oracle

CODED = [
    # slots, experts, out, in, bits, grids per matrix
    (5, 3, 7, 12, 2, 7),
    (1, 4, 35, 9, 1, 1),
    (8, 2, 3, 32, 4, 12),
    (3, 2, 2, 96, 1, 4),
    (2, 2, 2, 96, 1, 24),
    (3, 2, 1, 64, 4, 1),
    (40, 2, 66, 64, 2, 66),
    (130, 3, 5, 16, 2, 5),
    (2, 2, 33, 2080, 2, 33),
]


@pytest.mark.parametrize("case", CODED)
@pytest.mark.parametrize("symmetric", [False, True])
def test_quantized(
    case: tuple[int, ...],
    symmetric: bool,
    dtype: torch.dtype,
    device: str,
    kernels: Any,
    agree: Callable[..., None],
) -> None:
    slots, experts, out_features, in_features, bits, groups = case
    parts = [
        quantize(torch.randn(out_features, in_features), bits, groups, "uniform", symmetric) for _ in range(experts)
    ]
    codes, lows, steps = (torch.stack(tensors).to(device) for tensors in zip(*parts, strict=True))
    x = torch.randn(slots, in_features).to(device, dtype)
    expert = torch.randint(experts, (slots,), device=device)
    found = kernels.quantized_matvec(x, expert, codes, bits, lows.float(), steps.float())
    agree([found], [quantized_linear_oracle(x.double(), expert, codes, bits, lows.double(), steps.double())], dtype)


def test_groups_must_fill_bytes(device: str, kernels: Any) -> None:
    x, expert = torch.ones(2, 12, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    codes, grids = torch.zeros(1, 3, 3, dtype=torch.uint8, device=device), torch.ones(1, 6, device=device)
    with pytest.raises(ValueError, match="a group must fill whole bytes: got 6 columns of 2 bits"):
        kernels.quantized_matvec(x, expert, codes, 2, grids, grids)


SPARSE = [
    # slots, experts, out, in, kept per matrix
    (5, 3, 7, 12, 40),
    (1, 2, 9, 30, 100),
    (23, 2, 11, 64, 300),
    (150, 3, 4, 5, 20),
    (3, 2, 2, 300, 500),
]


@pytest.mark.parametrize("case", SPARSE)
def test_sparse(
    case: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    kernels: Any,
    agree: Callable[..., None],
    make_entries: Callable[..., Any],
) -> None:
    slots, experts, out_features, in_features, kept = case
    values, columns, row_starts = make_entries(experts, out_features, in_features, kept, dtype)
    x = torch.randn(slots, in_features).to(device, dtype)
    expert = torch.randint(experts, (slots,), device=device)
    found = kernels.sparse_matvec(x, expert, values, columns, row_starts)
    agree([found], [sparse_linear_oracle(x.double(), expert, values.double(), columns, row_starts)], dtype)
