"""Products with E sparse matrices of one shape, each slot with the matrix of its expert.

S slots, E experts, O/I out/in features, N kept entries of a matrix, P = O + 1 row boundaries.
Matrices are compressed by rows: entries ascend, those of row o are row_starts[o] … row_starts[o + 1] − 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ders.kernels.autocast import cast_for_matmul
from ders.kernels.gpu import on_gpu
from ders.kernels.native.library import call, usable


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
    """y (S, O) with y_s = Δ_{e(s)} x_s; differentiable in x and the values. Sums are kept in fp32 or wider."""
    x_SI, values_EN = cast_for_matmul(x_SI, values_EN)
    # The one place where the device decides. On a GPU there is a product for decoding, which needs no gradients.
    if usable(x_SI.device.type, x_SI.dtype) or (on_gpu(x_SI) and not torch.is_grad_enabled()):
        result: Tensor = _native(x_SI, expert_S, values_EN, columns_EN, row_starts_EP)
        return result
    return _in_torch(x_SI, expert_S, values_EN, columns_EN, row_starts_EP)


@torch.library.custom_op("ders::sparse_linear", mutates_args=())
def _native(x_SI: Tensor, expert_S: Tensor, values_EN: Tensor, columns_EN: Tensor, row_starts_EP: Tensor) -> Tensor:
    if x_SI.is_cuda:
        from ders.kernels.triton import sparse_matvec

        return sparse_matvec(x_SI, expert_S, values_EN, columns_EN, row_starts_EP)
    y_SO = x_SI.new_empty(len(x_SI), row_starts_EP.shape[1] - 1)
    matrices = (values_EN.contiguous(), columns_EN.contiguous(), row_starts_EP.contiguous())
    slots = (x_SI.contiguous(), expert_S.contiguous())
    call("sparse_forward", x_SI.dtype, *slots, *matrices, y_SO, *_sizes(x_SI, *matrices))
    return y_SO


@_native.register_fake
def _(x_SI: Tensor, expert_S: Tensor, values_EN: Tensor, columns_EN: Tensor, row_starts_EP: Tensor) -> Tensor:
    return x_SI.new_empty(len(x_SI), row_starts_EP.shape[1] - 1)


@torch.library.custom_op("ders::sparse_linear_backward", mutates_args=())
def _native_backward(
    grad_SO: Tensor,
    x_SI: Tensor,
    expert_S: Tensor,
    values_EN: Tensor,
    columns_EN: Tensor,
    row_starts_EP: Tensor,
    of_x: bool,
    of_values: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the values; empty where they are not asked for."""
    grad_SO, x_SI, expert_S = grad_SO.contiguous(), x_SI.contiguous(), expert_S.contiguous()
    indices = (columns_EN.contiguous(), row_starts_EP.contiguous())
    sizes = _sizes(x_SI, values_EN, columns_EN, row_starts_EP)
    of_x_SI = torch.empty_like(x_SI) if of_x else x_SI.new_empty(0)
    of_values_EN = values_EN.new_empty(values_EN.shape if of_values else 0)
    if of_x:
        call("sparse_backward_x", x_SI.dtype, grad_SO, expert_S, values_EN.contiguous(), *indices, of_x_SI, *sizes)
    if of_values:
        call("sparse_backward_values", x_SI.dtype, grad_SO, x_SI, expert_S, *indices, of_values_EN, *sizes)
    return of_x_SI, of_values_EN


@_native_backward.register_fake
def _(
    grad_SO: Tensor,
    x_SI: Tensor,
    expert_S: Tensor,
    values_EN: Tensor,
    columns_EN: Tensor,
    row_starts_EP: Tensor,
    of_x: bool,
    of_values: bool,
) -> tuple[Tensor, Tensor]:
    return x_SI.new_empty(x_SI.shape if of_x else 0), values_EN.new_empty(values_EN.shape if of_values else 0)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_values = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    of_x_SI, of_values_EN = _native_backward(grad_SO, *ctx.saved_tensors, of_x, of_values)
    return of_x_SI if of_x else None, None, of_values_EN if of_values else None, None, None


_native.register_autograd(_gradients, setup_context=_keep)


def _sizes(x_SI: Tensor, values_EN: Tensor, columns_EN: Tensor, row_starts_EP: Tensor) -> tuple[int, ...]:
    """S, E, N, O, I as the kernels take them."""
    return len(x_SI), *values_EN.shape, row_starts_EP.shape[1] - 1, x_SI.shape[1]


def _in_torch(x_SI: Tensor, expert_S: Tensor, values_EN: Tensor, columns_EN: Tensor, row_starts_EP: Tensor) -> Tensor:
    """Torch operations alone.

    Thin matrices gather the few entries they touch, slot by slot. Thicker ones run as compressed-row products: on the
    CPU each expert over its own slots; elsewhere that would wait for the slot counts, so each expert runs over all
    slots with the others' rows masked, E times a product that is a few percent of the dense one.
    """
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
