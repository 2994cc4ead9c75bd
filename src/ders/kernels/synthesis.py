"""Products with W + Δ_e, a block of rows of one such matrix at a time.

S slots sorted by expert, E experts, O/I out/in features, R rows of a block, N kept entries of a matrix.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ders.kernels.autocast import cast_for_matmul
from ders.kernels.forms import Coded, Form, LowRank, Sparse
from ders.kernels.gpu import on_gpu, takes_codes
from ders.kernels.grouped import grouped_linear, grouped_linear_oracle
from ders.kernels.native.library import call, usable
from ders.kernels.quantization import coded_product, coded_rows, dequantize, row_blocks

# Entries of a block, which lies in the cache while a matrix product reads it: few would slow the product down.
BLOCK = 1 << 20
# Slots of an expert, on average, up to which one pass in compiled code beats blocks and a matrix product.
FEW = 64


def synthesized_linear_oracle(x_SI: Tensor, counts_E: Tensor, weight_OI: Tensor, form: Form) -> Tensor:
    """Builds every matrix and multiplies slot by slot."""
    return grouped_linear_oracle(x_SI, counts_E, _matrices(weight_OI, form))


def synthesized_linear(x_SI: Tensor, counts_E: Tensor, weight_OI: Tensor, form: Form) -> Tensor:
    """y (S, O) with y_s = (W + Δ_{e(s)}) x_s; the first counts_E[0] rows belong to expert 0, the next to expert 1, …

    Differentiable in x, the weight, and the values or factors of the form; keeps these for the backward pass, and
    builds a block of rows of one matrix at a time. Sums W + Δ_e are rounded to the type of x, as those of stored
    experts are; low-rank factors are applied beside W instead, which is exact and costs less. On a GPU without
    Triton all E matrices are built.
    """
    x_SI, weight_OI = cast_for_matmul(x_SI, weight_OI)
    if isinstance(form, LowRank):
        a_ERI, b_EOR = cast_for_matmul(x_SI, *form)[1:]
        return x_SI @ weight_OI.T + grouped_linear(grouped_linear(x_SI, counts_E, a_ERI), counts_E, b_EOR)
    if isinstance(form, Sparse):
        form = form._replace(values_EN=cast_for_matmul(x_SI, form.values_EN)[1])
    # The one place where the device decides.
    if x_SI.device.type != "cpu" and not (on_gpu(x_SI) and (isinstance(form, Sparse) or takes_codes(form))):
        return grouped_linear(x_SI, counts_E, _matrices(weight_OI, form))
    if isinstance(form, Sparse):
        indices = [form.columns_EN, form.row_starts_EP]
        result: Tensor = _blockwise(x_SI, counts_E, weight_OI, form.values_EN, indices, 0)
    else:
        codes = [form.codes_EOB, form.lows_EG.float(), form.steps_EG.float()]
        result = _blockwise(x_SI, counts_E, weight_OI, None, codes, form.bits)
    return result


@torch.library.custom_op("ders::synthesized_linear", mutates_args=())
def _blockwise(
    x_SI: Tensor, counts_E: Tensor, weight_OI: Tensor, values_EN: Tensor | None, parts: list[Tensor], bits: int
) -> Tensor:
    """Of a sparse form the values and indices, of a coded one None and codes, origins and steps."""
    if x_SI.is_cuda:
        from ders.kernels import triton

        if values_EN is not None:
            return triton.synthesized_sparse(x_SI, counts_E, weight_OI, values_EN, *parts)
        codes_EOB, *grids = parts
        return triton.synthesized_quantized(x_SI, counts_E, weight_OI, codes_EOB, bits, *grids)
    form = _form(values_EN, parts, bits)
    if len(x_SI) <= FEW * len(counts_E) and usable("cpu", x_SI.dtype):
        return _in_one_pass(x_SI, counts_E, weight_OI, form)
    y_SO = x_SI.new_empty(len(x_SI), len(weight_OI))
    experts = _experts(counts_E)
    for rows, block_RI in _blocks(weight_OI):
        for e, slots in experts:
            _write_rows(e, rows, weight_OI, form, block_RI)
            torch.mm(x_SI[slots], block_RI.T, out=y_SO[slots, rows])
    return y_SO


@_blockwise.register_fake
def _(
    x_SI: Tensor, counts_E: Tensor, weight_OI: Tensor, values_EN: Tensor | None, parts: list[Tensor], bits: int
) -> Tensor:
    return x_SI.new_empty(len(x_SI), len(weight_OI))


@torch.library.custom_op("ders::synthesized_linear_backward", mutates_args=())
def _blockwise_backward(
    grad_SO: Tensor,
    x_SI: Tensor,
    counts_E: Tensor,
    weight_OI: Tensor,
    values_EN: Tensor | None,
    parts: list[Tensor],
    bits: int,
    of_x: bool,
    of_weight: bool,
    of_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the weight and the values; empty where they are not asked for."""
    if x_SI.is_cuda:
        from ders.kernels import triton

        of_weight_OI = grad_SO.T @ x_SI
        if values_EN is not None:
            found = triton.synthesized_sparse_backward(grad_SO, x_SI, counts_E, weight_OI, values_EN, *parts)
            return found[0], of_weight_OI, found[1]
        codes_EOB, *grids = parts
        of_x_SI = triton.synthesized_quantized_backward(grad_SO, counts_E, weight_OI, codes_EOB, bits, *grids)
        return of_x_SI, of_weight_OI, x_SI.new_empty(0)
    form = _form(values_EN, parts, bits)
    # Sums over blocks and experts are kept in fp32: half precision would lose a little in each.
    wide = torch.promote_types(x_SI.dtype, torch.float32)
    of_x_SI = x_SI.new_zeros(x_SI.shape if of_x else 0, dtype=wide)
    of_weight_OI = weight_OI.new_empty(weight_OI.shape if of_weight else 0)
    of_values_EN = x_SI.new_zeros(values_EN.shape if of_values and values_EN is not None else 0)
    if of_weight and not of_values:
        torch.mm(grad_SO.T, x_SI, out=of_weight_OI)
    experts = _experts(counts_E)
    for rows, block_RI in _blocks(weight_OI) if of_x or of_values else ():
        sum_RI = torch.zeros_like(block_RI, dtype=wide)
        for e, slots in experts:
            if of_x:
                _write_rows(e, rows, weight_OI, form, block_RI)
                _add_product(of_x_SI[slots], grad_SO[slots, rows], block_RI)
            if of_values and isinstance(form, Sparse):
                torch.mm(grad_SO[slots, rows].T, x_SI[slots], out=block_RI)
                _read_entries(e, rows, form, block_RI, of_values_EN)
                sum_RI += block_RI
        if of_weight and of_values:
            of_weight_OI[rows] = sum_RI
    return of_x_SI.to(x_SI.dtype), of_weight_OI, of_values_EN


@_blockwise_backward.register_fake
def _(
    grad_SO: Tensor,
    x_SI: Tensor,
    counts_E: Tensor,
    weight_OI: Tensor,
    values_EN: Tensor | None,
    parts: list[Tensor],
    bits: int,
    of_x: bool,
    of_weight: bool,
    of_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x_SI.new_empty(x_SI.shape if of_x else 0),
        weight_OI.new_empty(weight_OI.shape if of_weight else 0),
        x_SI.new_empty(values_EN.shape if of_values and values_EN is not None else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_SI, counts_E, weight_OI, values_EN, parts, ctx.bits = inputs
    ctx.save_for_backward(x_SI, counts_E, weight_OI, values_EN, *parts)


def _gradients(ctx: Any, grad_SO: Tensor) -> tuple[Any, ...]:
    x_SI, counts_E, weight_OI, values_EN, *parts = ctx.saved_tensors
    needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], values_EN is not None and ctx.needs_input_grad[3])
    found = _blockwise_backward(grad_SO, x_SI, counts_E, weight_OI, values_EN, parts, ctx.bits, *needed)
    of_x_SI, of_weight_OI, of_values_EN = (grad if wanted else None for grad, wanted in zip(found, needed, strict=True))
    return of_x_SI, None, of_weight_OI, of_values_EN, [None] * len(parts), None


_blockwise.register_autograd(_gradients, setup_context=_keep)


def _form(values_EN: Tensor | None, parts: list[Tensor], bits: int) -> Sparse | Coded:
    if values_EN is not None:
        return Sparse(values_EN, *parts)
    codes_EOB, lows_EG, steps_EG = parts
    return Coded(codes_EOB, bits, lows_EG, steps_EG)


def _experts(counts_E: Tensor) -> list[tuple[int, slice]]:
    """Each expert that has slots, with them."""
    counts = counts_E.tolist()
    ends = itertools.accumulate(counts)
    return [(e, slice(end - count, end)) for e, (count, end) in enumerate(zip(counts, ends, strict=True)) if count]


def _blocks(weight_OI: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and memory for as many: the same for all blocks."""
    out_features, in_features = weight_OI.shape
    block = weight_OI.new_empty(max(1, min(out_features, BLOCK // in_features)), in_features)
    for rows in row_blocks(out_features, in_features, BLOCK):
        yield rows, block[: rows.stop - rows.start]


def _in_one_pass(x_SI: Tensor, counts_E: Tensor, weight_OI: Tensor, form: Sparse | Coded) -> Tensor:
    expert_S = torch.repeat_interleave(counts_E)
    if isinstance(form, Coded):
        return coded_product(x_SI, expert_S, weight_OI, *form)
    y_SO = x_SI.new_empty(len(x_SI), len(weight_OI))
    parts = (t.contiguous() for t in (weight_OI, form.values_EN, form.columns_EN, form.row_starts_EP))
    sizes = (len(x_SI), len(counts_E), *weight_OI.shape, form.values_EN.shape[1])
    call("sum_product", x_SI.dtype, x_SI.contiguous(), expert_S, *parts, y_SO, *sizes)
    return y_SO


def _write_rows(expert: int, rows: slice, weight_OI: Tensor, form: Sparse | Coded, out_RI: Tensor) -> None:
    """out = rows of W + Δ_e."""
    native = usable("cpu", out_RI.dtype)
    if isinstance(form, Coded) and native:
        coded_rows(expert, rows, weight_OI, *form, out_RI)
    elif isinstance(form, Coded):
        out_RI.copy_(_plus_codes(weight_OI, form, expert, rows))
    elif native:
        parts = (t.contiguous() for t in (weight_OI, form.values_EN, form.columns_EN, form.row_starts_EP))
        sizes = (*weight_OI.shape, form.values_EN.shape[1], expert, rows.start, rows.stop)
        call("sum_rows", out_RI.dtype, *parts, out_RI, *sizes)
    else:
        out_RI.copy_(_plus_entries(weight_OI, form, expert, rows))


def _read_entries(expert: int, rows: slice, form: Sparse, block_RI: Tensor, out_EN: Tensor) -> None:
    """The entries of Δ_e in those rows, out of a dense block of them."""
    if usable("cpu", block_RI.dtype):
        columns_N, starts_P = form.columns_EN[expert].contiguous(), form.row_starts_EP[expert].contiguous()
        sizes = (block_RI.shape[1], rows.start, rows.stop)
        call("entries_of_rows", block_RI.dtype, block_RI, columns_N, starts_P, out_EN[expert], *sizes)
    else:
        own, rows_N, columns_N = _entries(form, expert, rows)
        out_EN[expert, own] = block_RI[rows_N, columns_N]


def _add_product(to_SI: Tensor, grad_SR: Tensor, block_RI: Tensor) -> None:
    if to_SI.dtype == grad_SR.dtype:
        to_SI.addmm_(grad_SR, block_RI)
    else:
        to_SI += grad_SR @ block_RI


def _matrices(weight_OI: Tensor, form: Form) -> Tensor:
    """All W + Δ_e (E, O, I), differentiable."""
    if isinstance(form, LowRank):
        return weight_OI + form.b_EOR @ form.a_ERI
    rows = slice(0, len(weight_OI))
    if isinstance(form, Coded):
        return torch.stack([_plus_codes(weight_OI, form, e, rows) for e in range(len(form.codes_EOB))])
    return torch.stack([_plus_entries(weight_OI, form, e, rows) for e in range(len(form.values_EN))])


def _plus_codes(weight_OI: Tensor, form: Coded, expert: int, rows: slice) -> Tensor:
    # In fp32 or wider and only then cast: fp16 cannot name the grids of small deltas.
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    per_row = form.lows_EG.shape[1] // len(weight_OI)
    own = slice(rows.start * per_row, rows.stop * per_row) if per_row else slice(None)
    grids = (grid_EG[expert, own].to(wide) for grid_EG in (form.lows_EG, form.steps_EG))
    delta_RI = dequantize(form.codes_EOB[expert, rows], form.bits, weight_OI.shape[1], *grids)
    return (weight_OI[rows] + delta_RI).to(weight_OI.dtype)


def _plus_entries(weight_OI: Tensor, form: Sparse, expert: int, rows: slice) -> Tensor:
    own, rows_N, columns_N = _entries(form, expert, rows)
    return weight_OI[rows].index_put((rows_N, columns_N), form.values_EN[expert, own], accumulate=True)


def _entries(form: Sparse, expert: int, rows: slice) -> tuple[slice, Tensor, Tensor]:
    """Which entries lie in those rows; their rows, counted from the first of these, and their columns."""
    starts_P = form.row_starts_EP[expert, rows.start : rows.stop + 1]
    own = slice(int(starts_P[0]), int(starts_P[-1]))
    return own, torch.repeat_interleave(starts_P.diff()), form.columns_EN[expert, own].long()
