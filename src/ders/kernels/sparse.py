"""Products with E sparse matrices of one shape, each slot with the matrix of its expert.

S slots, E experts, O/I out/in features, N kept entries of a matrix, P = O + 1 row boundaries.
Matrices are compressed by rows: entries ascend, those of row o are row_starts[o] … row_starts[o + 1] − 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ders.kernels.autocast import cast_for_matmul


def sparse_linear_oracle(
    x_SI: Tensor, expert_S: Tensor, values_EN: Tensor, columns_EN: Tensor, row_starts_EP: Tensor
) -> Tensor:
    """Builds every matrix and multiplies slot by slot."""
    matrices = []
    for values_N, columns_N, starts_P in zip(values_EN, columns_EN, row_starts_EP, strict=True):
        rows_N = torch.repeat_interleave(torch.arange(len(starts_P) - 1, device=x_SI.device), starts_P.diff())
        empty_OI = values_N.new_zeros(len(starts_P) - 1, x_SI.shape[1])
        matrices.append(empty_OI.index_put((rows_N, columns_N.long()), values_N))
    return torch.einsum("soi,si->so", torch.stack(matrices)[expert_S], x_SI)


def sparse_linear(
    x_SI: Tensor, expert_S: Tensor, values_EN: Tensor, columns_EN: Tensor, row_starts_EP: Tensor
) -> Tensor:
    """y (S, O) with y_s = Δ_{e(s)} x_s; differentiable in x and the values.

    Thin matrices gather the few entries they touch, slot by slot. Thicker ones run as compressed-row products: on the
    CPU each expert over its own slots; elsewhere that would wait for the slot counts, so each expert runs over all
    slots with the others' rows masked, E times a product that is a few percent of the dense one.
    """
    x_SI, values_EN = cast_for_matmul(x_SI, values_EN)
    # Gathering moves S·N numbers, a compressed-row product copies S·(I + O) of them first: they break even about here.
    if values_EN.shape[1] <= x_SI.shape[1] + row_starts_EP.shape[1]:
        return _by_gathering(x_SI, expert_S, values_EN, columns_EN, row_starts_EP)
    if x_SI.device.type == "cpu":
        return _by_slots_of_each_expert(x_SI, expert_S, values_EN, columns_EN, row_starts_EP)
    return _by_masks(x_SI, expert_S, values_EN, columns_EN, row_starts_EP)


def _by_gathering(
    x_SI: Tensor, expert_S: Tensor, values_EN: Tensor, columns_EN: Tensor, row_starts_EP: Tensor
) -> Tensor:
    entry_EN = torch.arange(values_EN.shape[1], device=x_SI.device, dtype=torch.int32).expand(columns_EN.shape)
    rows_EN = torch.searchsorted(row_starts_EP, entry_EN.contiguous(), right=True) - 1
    products_SN = x_SI.gather(1, columns_EN[expert_S].long()) * values_EN[expert_S]
    y_SO = x_SI.new_zeros(len(x_SI), row_starts_EP.shape[1] - 1)
    return y_SO.scatter_add(1, rows_EN[expert_S], products_SN)


def _csr_product(x_SI: Tensor, values_N: Tensor, columns_N: Tensor, row_starts_P: Tensor) -> Tensor:
    # An embedding bag over the features *is* a CSR product, with gradients for both sides: bag o sums
    # values[n] * x.T[columns[n]] over the entries n of row o.
    y_OS = F.embedding_bag(
        columns_N,
        x_SI.T.contiguous(),
        row_starts_P,
        mode="sum",
        per_sample_weights=values_N,
        include_last_offset=True,
    )
    return y_OS.T


def _by_slots_of_each_expert(
    x_SI: Tensor, expert_S: Tensor, values_EN: Tensor, columns_EN: Tensor, row_starts_EP: Tensor
) -> Tensor:
    order_S = expert_S.argsort(stable=True)
    counts = expert_S.bincount(minlength=len(values_EN)).tolist()
    parts = [
        _csr_product(x_SI[slots], values_EN[e], columns_EN[e], row_starts_EP[e])
        for e, slots in enumerate(order_S.split(counts))
    ]
    return torch.cat(parts)[order_S.argsort()]


def _by_masks(x_SI: Tensor, expert_S: Tensor, values_EN: Tensor, columns_EN: Tensor, row_starts_EP: Tensor) -> Tensor:
    y_SO = x_SI.new_zeros(len(x_SI), row_starts_EP.shape[1] - 1)
    for e in range(len(values_EN)):
        mine_S1 = (expert_S == e).unsqueeze(1)
        y_SO = y_SO + _csr_product(x_SI * mine_S1, values_EN[e], columns_EN[e], row_starts_EP[e])
    return y_SO
