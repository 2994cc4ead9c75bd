"""Grouped products with W_e = W + Δ_e, where thick deltas make two products dearer than one with the sum.

S slots sorted by expert, E experts, O/I out/in features, G groups of a matrix that share a grid, B bytes of a packed
row, N kept entries, P = O + 1. BM slots, BN outputs and BK summed features make a tile.

Codes become weights on their way into the product: a tile of W_e exists in registers, for one step of one program.
Sparse entries cannot: those of a tile lie scattered over its rows, and looking for them costs more than the product.
They are written over a copy of some rows of W, for all experts at once, 1/E of the rows (or columns), so that what is
built is never larger than W itself, mostly stays in the L2 cache, and is built once, not once per tile of slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ders.kernels.triton.common import check_floats, empty_as, next_power
from ders.kernels.triton.quantized import group_columns


@triton.jit
def _find_tile(counts, tile, E, BM: tl.constexpr, EP: tl.constexpr):
    """(Expert, first slot, end of the expert's slots) of a tile of slots; E where there is no such tile."""
    e_E = tl.arange(0, EP)
    count_E = tl.load(counts + e_E, mask=e_E < E, other=0).to(tl.int64)
    tiles_E = (count_E + BM - 1) // BM
    before_E = tl.cumsum(tiles_E, 0)
    expert = tl.sum(((before_E <= tile) & (e_E < E)).to(tl.int64), 0)
    start = tl.sum(tl.where(e_E < expert, count_E, 0), 0)
    first = start + (tile - tl.sum(tl.where(e_E < expert, tiles_E, 0), 0)) * BM
    end = start + tl.sum(tl.where(e_E == expert, count_E, 0), 0)
    return expert, first, end


@triton.jit
def _delta_tile(
    codes, lows, steps, o_R, i_first, in_O, O, I, B, groups_per_row, bytes_per_group,
    BITS: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """(rows, BI columns from i_first on) of a matrix of codes, in fp32."""
    VALUES: tl.constexpr = 8 // BITS
    b_B = i_first // VALUES + tl.arange(0, BI // VALUES)
    mask_RB = in_O[:, None] & (b_B < B)[None, :]
    byte_RB = tl.load(codes + o_R[:, None].to(tl.int64) * B + b_B[None, :], mask=mask_RB, other=0).to(tl.int32)
    group_RB = o_R[:, None].to(tl.int64) * groups_per_row + (b_B // bytes_per_group)[None, :]
    low_RB = tl.load(lows + group_RB, mask=mask_RB, other=0).to(tl.float32)
    step_RB = tl.load(steps + group_RB, mask=mask_RB, other=0).to(tl.float32)
    shift_V = tl.arange(0, VALUES) * BITS
    code_RBV = (byte_RB[:, :, None] >> shift_V[None, None, :]) & ((1 << BITS) - 1)
    delta_RBV = low_RB[:, :, None] + step_RB[:, :, None] * code_RBV.to(tl.float32)
    return tl.reshape(delta_RBV, (delta_RBV.shape[0], BI))


@triton.jit
def _grouped(
    x, counts, weight, weight_e, weight_o, codes, lows, steps, out, S, O, I, E, x_stride, out_stride, tiles_m, tiles_n,
    B, G, groups_per_row, bytes_per_group,
    TRANSPOSED: tl.constexpr, BITS: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """x W_eᵀ, or x W_e where TRANSPOSED (a gradient's way back); W_e is `weight`, plus codes unless BITS is 0."""
    # Bands of neighbouring tiles of slots take turns over the outputs, so that both operands are found in the L2 cache.
    program = tl.program_id(0)
    band = program // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    tile_m = band * BAND + program % (BAND * tiles_n) % height
    tile_n = program % (BAND * tiles_n) // height
    e, first, end = _find_tile(counts, tile_m, E, BM, EP)
    if e < E:
        slot_M = first + tl.arange(0, BM)
        n_N = tile_n * BN + tl.arange(0, BN)
        acc_MN = tl.zeros((BM, BN), tl.float32)
        x_M = x + slot_M * x_stride
        for k in range(0, O if TRANSPOSED else I, BK):
            k_K = k + tl.arange(0, BK)
            in_K = k_K < (O if TRANSPOSED else I)
            x_MK = tl.load(x_M[:, None] + k_K[None, :], mask=(slot_M < end)[:, None] & in_K[None, :], other=0)
            if TRANSPOSED:
                o_R, i_C, i_first = k_K, n_N, tile_n * BN
            else:
                o_R, i_C, i_first = n_N, k_K, k
            mask_RC = (o_R < O)[:, None] & (i_C < I)[None, :]
            row_R = weight + e * weight_e + o_R.to(tl.int64) * weight_o
            w_RC = tl.load(row_R[:, None] + i_C[None, :], mask=mask_RC, other=0)
            if BITS > 0:
                delta_RC = _delta_tile(
                    codes + e * O * B, lows + e * G, steps + e * G, o_R, i_first, o_R < O, O, I, B,
                    groups_per_row, bytes_per_group, BITS, BN if TRANSPOSED else BK,
                )  # fmt: skip
                w_RC = (w_RC.to(tl.float32) + delta_RC).to(x_MK.dtype)
            if TRANSPOSED:
                acc_MN = tl.dot(x_MK, w_RC, acc=acc_MN, input_precision="ieee")
            else:
                acc_MN = tl.dot(x_MK, tl.trans(w_RC), acc=acc_MN, input_precision="ieee")
        mask_MN = (slot_M < end)[:, None] & (n_N < (I if TRANSPOSED else O))[None, :]
        tl.store(out + (slot_M * out_stride)[:, None] + n_N[None, :], acc_MN.to(out.dtype.element_ty), mask=mask_MN)


@triton.jit
def _outer(
    grad, x, counts, out, O, I, E, grad_stride,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[e] = gradᵀ x over the slots of e: (E, O, I)."""
    tile_o, tile_i, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    e_E = tl.arange(0, EP)
    count_E = tl.load(counts + e_E, mask=e_E < E, other=0).to(tl.int64)
    start = tl.sum(tl.where(e_E < e, count_E, 0), 0)
    count = tl.sum(tl.where(e_E == e, count_E, 0), 0).to(tl.int32)
    o_M, i_N = tile_o * BM + tl.arange(0, BM), tile_i * BN + tl.arange(0, BN)
    acc_MN = tl.zeros((BM, BN), tl.float32)
    for k in range(0, count, BK):
        k_K = k + tl.arange(0, BK)
        slot_K = start + k_K
        grad_KM = tl.load(
            grad + (slot_K * grad_stride)[:, None] + o_M[None, :],
            mask=(k_K < count)[:, None] & (o_M < O)[None, :],
            other=0,
        )
        x_KN = tl.load(
            x + (slot_K * I)[:, None] + i_N[None, :], mask=(k_K < count)[:, None] & (i_N < I)[None, :], other=0
        )
        acc_MN = tl.dot(tl.trans(grad_KM), x_KN, acc=acc_MN, input_precision="ieee")
    offset_MN = (e * O + o_M)[:, None] * I + i_N[None, :]
    tl.store(out + offset_MN, acc_MN.to(out.dtype.element_ty), mask=(o_M < O)[:, None] & (i_N < I)[None, :])


@triton.jit
def _entries(
    dense, values, columns, row_starts, N, P, first_row, end_row, first_column, end_column,
    ADD: tl.constexpr, BO: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds the entries of a window of every matrix to `dense` (E, rows, columns), or reads them from it.

    A position has at most one entry, so no two programs, and no two lanes, meet.
    """
    tile_o, e = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, width = end_row - first_row, end_column - first_column
    o_O = first_row + tile_o * BO + tl.arange(0, BO)
    starts_O = row_starts + e * P + o_O
    begin_O = tl.load(starts_O, mask=o_O < end_row, other=0)
    end_O = tl.load(starts_O + 1, mask=o_O < end_row, other=0)
    dense_O = dense + (e * rows + (o_O - first_row)) * width
    for passed in range(0, tl.max(end_O - begin_O, 0), BN):
        n_ON = begin_O[:, None] + passed + tl.arange(0, BN)[None, :]
        there_ON = n_ON < end_O[:, None]
        column_ON = tl.load(columns + e * N + n_ON, mask=there_ON, other=0)
        mask_ON = there_ON & (column_ON >= first_column) & (column_ON < end_column)
        place_ON = dense_O[:, None] + (column_ON - first_column)
        old_ON = tl.load(place_ON, mask=mask_ON, other=0)
        if ADD:
            value_ON = tl.load(values + e * N + n_ON, mask=mask_ON, other=0).to(tl.float32)
            tl.store(place_ON, (old_ON.to(tl.float32) + value_ON).to(dense.dtype.element_ty), mask=mask_ON)
        else:
            tl.store(values + e * N + n_ON, old_ON.to(values.dtype.element_ty), mask=mask_ON)


def synthesized_quantized(
    x_SI: Tensor,
    counts_E: Tensor,
    weight_OI: Tensor,
    codes_EOB: Tensor,
    bits: int,
    lows_EG: Tensor,
    steps_EG: Tensor,
) -> Tensor:
    """y (S, O) with y_s = (W + Δ_{e(s)}) x_s; the first counts_E[0] rows of x are expert 0's, the next expert 1's, …

    Args:
        counts_E: on the device; never waited for.
        codes_EOB, bits, lows_EG, steps_EG: as for `quantized_matvec`.
    """
    y_SO = x_SI.new_empty(len(x_SI), weight_OI.shape[0])
    _multiply_coded(x_SI, counts_E, weight_OI, codes_EOB, bits, lows_EG, steps_EG, y_SO, transposed=False)
    return y_SO


def synthesized_quantized_backward(
    grad_SO: Tensor,
    counts_E: Tensor,
    weight_OI: Tensor,
    codes_EOB: Tensor,
    bits: int,
    lows_EG: Tensor,
    steps_EG: Tensor,
) -> Tensor:
    """The gradient of x (S, I); that of W is gradᵀ x over all slots, whatever their experts."""
    d_x_SI = grad_SO.new_empty(len(grad_SO), weight_OI.shape[1])
    _multiply_coded(grad_SO, counts_E, weight_OI, codes_EOB, bits, lows_EG, steps_EG, d_x_SI, transposed=True)
    return d_x_SI


def synthesized_sparse(
    x_SI: Tensor,
    counts_E: Tensor,
    weight_OI: Tensor,
    values_EN: Tensor,
    columns_EN: Tensor,
    row_starts_EP: Tensor,
) -> Tensor:
    """y (S, O) with y_s = (W + Δ_{e(s)}) x_s; the first counts_E[0] rows of x are expert 0's, the next expert 1's, …"""
    (out_features, in_features), experts = weight_OI.shape, len(values_EN)
    x_SI, values_EN, y_SO = x_SI.contiguous(), values_EN.contiguous(), x_SI.new_empty(len(x_SI), out_features)
    for first, end in _windows(out_features, experts):
        built_ERI = weight_OI[first:end].repeat(experts, 1, 1)
        _visit(built_ERI, values_EN, columns_EN, row_starts_EP, (first, end), (0, in_features), add=True)
        _multiply(x_SI, counts_E, built_ERI, y_SO[:, first:end], transposed=False)
    return y_SO


def synthesized_sparse_backward(
    grad_SO: Tensor,
    x_SI: Tensor,
    counts_E: Tensor,
    weight_OI: Tensor,
    values_EN: Tensor,
    columns_EN: Tensor,
    row_starts_EP: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (S, I) and of the values (E, N); that of W is gradᵀ x over all slots, whatever their experts."""
    (out_features, in_features), experts = weight_OI.shape, len(values_EN)
    grad_SO, x_SI = grad_SO.contiguous(), x_SI.contiguous()
    values_EN, d_x_SI, d_values_EN = values_EN.contiguous(), empty_as(x_SI), empty_as(values_EN)
    for first, end in _windows(in_features, experts):
        built_EOC = weight_OI[:, first:end].repeat(experts, 1, 1)
        _visit(built_EOC, values_EN, columns_EN, row_starts_EP, (0, out_features), (first, end), add=True)
        _multiply(grad_SO, counts_E, built_EOC, d_x_SI[:, first:end], transposed=True)
    # At these densities all products of a window on the tensor cores are cheaper than the wanted tenth one by one.
    for first, end in _windows(out_features, experts):
        d_built_ERI = x_SI.new_empty(experts, end - first, in_features)
        tile = _tile(x_SI)
        grid = triton.cdiv(end - first, tile["BM"]), triton.cdiv(in_features, tile["BN"]), experts
        _outer[grid](
            grad_SO[:, first:end], x_SI, counts_E.contiguous(), d_built_ERI, end - first, in_features, experts,
            out_features, EP=next_power(experts), **tile,
        )  # fmt: skip
        _visit(d_built_ERI, d_values_EN, columns_EN, row_starts_EP, (first, end), (0, in_features), add=False)
    return d_x_SI, d_values_EN


def _windows(size: int, experts: int) -> list[tuple[int, int]]:
    """Ranges of a 1/E of `size`, a multiple of 16 where that is possible: rows then stay aligned."""
    step = triton.cdiv(triton.cdiv(size, experts), 16) * 16
    return [(first, min(first + step, size)) for first in range(0, size, step)]


def _visit(
    dense_ERC: Tensor,
    values_EN: Tensor,
    columns_EN: Tensor,
    row_starts_EP: Tensor,
    rows: tuple[int, int],
    columns: tuple[int, int],
    add: bool,
) -> None:
    kept, boundaries = values_EN.shape[1], row_starts_EP.shape[1]
    _entries[triton.cdiv(rows[1] - rows[0], 4), len(values_EN)](
        dense_ERC, values_EN, columns_EN.contiguous(), row_starts_EP.contiguous(), kept, boundaries, *rows, *columns,
        ADD=add, BO=4, BN=next_power(min(256, triton.cdiv(kept, boundaries - 1)), 16), num_warps=4,
    )  # fmt: skip


def _multiply(x: Tensor, counts_E: Tensor, weight_EOI: Tensor, out: Tensor, transposed: bool) -> None:
    _, out_features, in_features = weight_EOI.shape
    _launch(x, counts_E, weight_EOI, out_features * in_features, (weight_EOI,) * 3, (0, 1, 0, 1), 0, out, transposed)


def _multiply_coded(
    x: Tensor,
    counts_E: Tensor,
    weight_OI: Tensor,
    codes_EOB: Tensor,
    bits: int,
    lows_EG: Tensor,
    steps_EG: Tensor,
    out: Tensor,
    transposed: bool,
) -> None:
    out_features, in_features = weight_OI.shape
    groups_per_row, columns = group_columns(in_features, out_features, bits, lows_EG)
    tables = codes_EOB.contiguous(), lows_EG.contiguous(), steps_EG.contiguous()
    sizes = codes_EOB.shape[2], lows_EG.shape[1], groups_per_row, columns * bits // 8
    _launch(x, counts_E, weight_OI.contiguous()[None], 0, tables, sizes, bits, out, transposed)


def _launch(
    x: Tensor,
    counts_E: Tensor,
    weight: Tensor,
    weight_e: int,
    tables: tuple[Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int, int],
    bits: int,
    out: Tensor,
    transposed: bool,
) -> None:
    check_floats(x)
    if len(x) == 0:
        return
    x, experts = x.contiguous(), len(counts_E)
    tile = _tile(x)
    # How many tiles each expert has is known on the device alone: at most one of each is not full.
    tiles_m = min(triton.cdiv(len(x), tile["BM"]) + experts, len(x))
    tiles_n = triton.cdiv(out.shape[1], tile["BN"])
    _grouped[(tiles_m * tiles_n,)](
        x, counts_E.contiguous(), weight, weight_e, weight.shape[2], *tables, out, len(x), *weight.shape[1:], experts,
        x.shape[1], out.stride(0), tiles_m, tiles_n, *sizes,
        TRANSPOSED=transposed, BITS=bits, EP=next_power(experts), **tile, BAND=8,
    )  # fmt: skip


def _tile(x: Tensor) -> dict[str, int]:
    if x.dtype == torch.float32:  # outside the tensor cores
        return {"BM": 32, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2}
    if len(x) <= 512:
        return {"BM": 16 if len(x) <= 64 else 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}
    return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
