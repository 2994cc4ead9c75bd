"""What a delta is made of, as the kernels take it.

E experts, O/I out/in features, N kept entries of a matrix, P = O + 1 row boundaries, R rank, B bytes of a packed row,
G groups of a matrix that share a grid, M rows or columns of N hidden neurons, X features of the other side.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Sparse(NamedTuple):
    """Entries by rows: they ascend, and those of row o are row_starts[o] … row_starts[o + 1] − 1. Indices are int32.

    `rows_EN`, the row of each entry, says the same once more; thin matrices have it, where searching costs more than
    multiplying.
    """

    values_EN: Tensor
    columns_EN: Tensor
    row_starts_EP: Tensor
    rows_EN: Tensor | None = None


class LowRank(NamedTuple):
    """Δ_e = B_e A_e."""

    a_ERI: Tensor
    b_EOR: Tensor


class Coded(NamedTuple):
    """Codes of `bits` bits in packed rows, on evenly spaced grids (origins and steps in fp32)."""

    codes_EOB: Tensor
    bits: int
    lows_EG: Tensor
    steps_EG: Tensor


class Neurons(NamedTuple):
    """Rows (of an input projection) or columns (of the output's) of an FFN's hidden neurons; int64 neurons ascend.

    Where gate and up are one matrix, an expert's gate rows come before its up rows. Neurons that were drawn from the
    same are the same.
    """

    values_EMX: Tensor
    neurons_EN: Tensor
    drawn_from: tuple[int, ...] = ()


# What any matrix can be made of; neurons belong to a whole FFN.
Form = Sparse | LowRank | Coded


def entry_rows(columns_EN: Tensor, row_starts_EP: Tensor) -> Tensor:
    """The row of each entry (E, N), int32."""
    entry_EN = torch.arange(columns_EN.shape[1], device=columns_EN.device, dtype=torch.int32)
    entry_EN = entry_EN.expand(columns_EN.shape).contiguous()
    return torch.searchsorted(row_starts_EP, entry_EN, right=True, out_int32=True) - 1
