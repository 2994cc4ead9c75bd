"""Thin sparse deltas, activation, gates and their gradients between the two products with the shared base.

T tokens, K top-k, S slots of a tile, E experts, N kept entries of a matrix, P = rows + 1, F hidden width, I/O features
read and written, C columns of an input projection (F, or 2F where gate and up are one, gate first).

A tile of slots meets a tile of rows: their entries lie together in compressed rows, a run for each expert. Chunks of
all experts' runs become two factors whose product is the delta's part: what each entry reads (slots × entries, zero
for another expert's) and where its value goes (entries × rows, one number a row). The tensor cores add them up.
Reading is what costs: an entry reads a number of every slot. At T = 1 that is nothing; for many tokens x is transposed
first, so that a read is a run of neighbouring tokens. A multiplication on the tensor cores costs about a hundredth of a
read from the cache: at densities above about 1/1000 a grouped product with synthesised weights is cheaper.

The output projection reads all columns of h, so h goes through memory: two launches.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ders.kernels.triton import common
from ders.kernels.triton.common import (
    activate,
    check_activation,
    check_floats,
    empty_as,
    next_power,
    slot_tile,
    store_choices,
    sum_partials,
)

# From here on reads of neighbouring tokens pay for a transposition.
MANY_TOKENS = 64
# Rows of a tile.
_LOG_ROWS = 5
_ROWS = 2**_LOG_ROWS


@triton.jit
def _add_rows(
    y_SR, source, stride_t, stride_k, stride_c, values, columns, row_starts, N, P, E, first_row, end_row,
    t_S, k_S, expert_S, EP: tl.constexpr, BN: tl.constexpr, LOG_BR: tl.constexpr,
):  # fmt: skip
    """y[s, r] += the sum over the entries of row first_row + r, expert of s, of value · source[t, k, column].

    `source` has any strides; BN entries of each of EP experts are taken at once.
    """
    BR: tl.constexpr = 2**LOG_BR
    entry_N = tl.arange(0, EP * BN)
    e_N = entry_N // BN
    own_SN = expert_S[:, None] == e_N[None, :]
    used_N = tl.max(own_SN.to(tl.int32), 0) > 0
    starts_N = row_starts + e_N.to(tl.int64) * P
    n_N = tl.load(starts_N + first_row, mask=used_N, other=0) + entry_N % BN
    end_N = tl.load(starts_N + end_row, mask=used_N, other=0)
    longest = tl.max(end_N - n_N + entry_N % BN, 0)
    r_R = tl.arange(0, BR)
    source_S = source + t_S * stride_t + k_S.to(tl.int64) * stride_k
    for _ in range(0, longest, BN):
        there_N = n_N < end_N
        offset_N = e_N.to(tl.int64) * N + n_N
        column_N = tl.load(columns + offset_N, mask=there_N, other=0)
        value_N = tl.load(values + offset_N, mask=there_N, other=0)
        # The row of an entry is the last one that begins at or before it.
        row_N = tl.zeros((EP * BN,), tl.int32)
        for step in tl.static_range(LOG_BR):
            probe_N = row_N + (BR >> (step + 1))
            inside_N = there_N & (first_row + probe_N < end_row)
            begin_N = tl.load(starts_N + first_row + probe_N, mask=inside_N, other=0)
            row_N = tl.where(inside_N & (begin_N <= n_N), probe_N, row_N)
        read_SN = tl.load(
            source_S[:, None] + column_N.to(tl.int64)[None, :] * stride_c, mask=own_SN & there_N[None, :], other=0
        )
        placed_NR = tl.where(row_N[:, None] == r_R[None, :], value_N[:, None], 0).to(value_N.dtype)
        y_SR = tl.dot(read_SN, placed_NR, acc=y_SR, input_precision="ieee")
        n_N += BN
    return y_SR


@triton.jit
def _before_activation(
    pre, x, stride_t, stride_i, values, columns, row_starts, bias, N, E, C, first_row, end_row,
    t_S, k_S, valid_S, expert_S,
    HAS_BIAS: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr, LOG_BF: tl.constexpr,
):  # fmt: skip
    """(S, F) in fp32: base + delta + bias."""
    row_F = first_row + tl.arange(0, 2**LOG_BF)
    mask_SF = valid_S[:, None] & (row_F < end_row)[None, :]
    a_SF = tl.load(pre + t_S[:, None] * C + row_F[None, :], mask=mask_SF, other=0).to(tl.float32)
    if HAS_BIAS:
        a_SF += tl.load(bias + expert_S[:, None].to(tl.int64) * C + row_F[None, :], mask=mask_SF, other=0)
    return _add_rows(
        a_SF, x, stride_t, 0, stride_i, values, columns, row_starts, N, C + 1, E, first_row, end_row,
        t_S, k_S, expert_S, EP, BN, LOG_BF,
    )  # fmt: skip


@triton.jit
def _store_slots(out, x_SF, t_S, k_S, mask_SF, stride_t, stride_k, stride_f, column_F):
    offset_SF = (t_S * stride_t + k_S.to(tl.int64) * stride_k)[:, None] + column_F[None, :].to(tl.int64) * stride_f
    tl.store(out + offset_SF, x_SF.to(out.dtype.element_ty), mask=mask_SF)


@triton.jit
def _forward(
    x, x_t, x_i, pre0, pre1, index, gates, values0, columns0, starts0, values1, columns1, starts1, bias0, bias1,
    hbar, h, h_t, h_k, h_f, N0, N1, T, F, C, E, SECOND,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    EP: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, LOG_BF: tl.constexpr,
):  # fmt: skip
    """Σ_k g h, and g h slot by slot for the output projection's deltas."""
    BF: tl.constexpr = 2**LOG_BF
    tile_f, tile_t = tl.program_id(0), tl.program_id(1)
    t_S, k_S, valid_S, expert_S, gate_S = slot_tile(index, gates, tile_t, T, K, KP, BS)
    f_F = tile_f * BF + tl.arange(0, BF)
    in_F = f_F < F
    first, end = tile_f * BF, tl.minimum(tile_f * BF + BF, F)
    a_SF = _before_activation(
        pre0, x, x_t, x_i, values0, columns0, starts0, bias0, N0, E, C, first, end, t_S, k_S, valid_S, expert_S,
        HAS_BIAS, EP, BN, LOG_BF,
    )  # fmt: skip
    h_SF, _ = activate(a_SF, ACT)
    if GATED:
        h_SF *= _before_activation(
            pre1, x, x_t, x_i, values1, columns1, starts1, bias1, N1, E, C, first + SECOND, end + SECOND,
            t_S, k_S, valid_S, expert_S, HAS_BIAS, EP, BN, LOG_BF,
        )  # fmt: skip
    h_SF *= gate_S[:, None]
    store_choices(hbar, h_SF, tile_t, T, F, f_F, in_F, KP, BS, BF)
    _store_slots(h, h_SF, t_S, k_S, valid_S[:, None] & in_F[None, :], h_t, h_k, h_f, f_F)


@triton.jit
def _product(
    source0, source1, s_t, s_k, s_c, index, gates, values0, columns0, starts0, values1, columns1, starts1,
    out, N0, N1, T, O, E, TWO: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    EP: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, LOG_BR: tl.constexpr,
):  # fmt: skip
    """out[t] = Σ_k Δ_e source[t, k], or the sum of two such."""
    BR: tl.constexpr = 2**LOG_BR
    tile_r, tile_t = tl.program_id(0), tl.program_id(1)
    t_S, k_S, _valid_S, expert_S, _ = slot_tile(index, gates, tile_t, T, K, KP, BS)
    first, end = tile_r * BR, tl.minimum(tile_r * BR + BR, O)
    y_SR = tl.zeros((BS, BR), tl.float32)
    y_SR = _add_rows(
        y_SR, source0, s_t, s_k, s_c, values0, columns0, starts0, N0, O + 1, E, first, end, t_S, k_S, expert_S,
        EP, BN, LOG_BR,
    )  # fmt: skip
    if TWO:
        y_SR = _add_rows(
            y_SR, source1, s_t, s_k, s_c, values1, columns1, starts1, N1, O + 1, E, first, end, t_S, k_S, expert_S,
            EP, BN, LOG_BR,
        )  # fmt: skip
    r_R = first + tl.arange(0, BR)
    store_choices(out, y_SR, tile_t, T, O, r_R, r_R < O, KP, BS, BR)


@triton.jit
def _backward(
    grad_hbar, grad_y, grad_y_t, grad_y_o, values_out, rows_out, column_starts_out, N_out,
    x, x_t, x_i, pre0, pre1, index, gates, values0, columns0, starts0, values1, columns1, starts1, bias0, bias1,
    d_pre0, d_pre1, gate_partial, bias_partial0, bias_partial1, h, h_k, d_a0, d_a1, d_a_k, N0, N1, T, F, C, E, SECOND,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    EP: tl.constexpr, EB: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, LOG_BF: tl.constexpr,
):  # fmt: skip
    """Gradients of the base's results, partial sums of those of gates and biases, and what the others need: g h and the
    gradients before the activation, slot by slot, tokens last."""
    BF: tl.constexpr = 2**LOG_BF
    tile_f, tile_t = tl.program_id(0), tl.program_id(1)
    t_S, k_S, valid_S, expert_S, gate_S = slot_tile(index, gates, tile_t, T, K, KP, BS)
    f_F = tile_f * BF + tl.arange(0, BF)
    in_F = f_F < F
    mask_SF = valid_S[:, None] & in_F[None, :]
    first, end = tile_f * BF, tl.minimum(tile_f * BF + BF, F)

    # The gradient of what the output projection reads, before the gate.
    d_h_SF = tl.load(grad_hbar + t_S[:, None] * F + f_F[None, :], mask=mask_SF, other=0).to(tl.float32)
    d_h_SF = _add_rows(
        d_h_SF, grad_y, grad_y_t, 0, grad_y_o, values_out, rows_out, column_starts_out, N_out, F + 1, E, first, end,
        t_S, k_S, expert_S, EP, BN, LOG_BF,
    )  # fmt: skip
    a0_SF = _before_activation(
        pre0, x, x_t, x_i, values0, columns0, starts0, bias0, N0, E, C, first, end, t_S, k_S, valid_S, expert_S,
        HAS_BIAS, EP, BN, LOG_BF,
    )  # fmt: skip
    h_SF, d_a0_SF = activate(a0_SF, ACT)
    d_a1_SF = h_SF * gate_S[:, None] * d_h_SF
    if GATED:
        a1_SF = _before_activation(
            pre1, x, x_t, x_i, values1, columns1, starts1, bias1, N1, E, C, first + SECOND, end + SECOND,
            t_S, k_S, valid_S, expert_S, HAS_BIAS, EP, BN, LOG_BF,
        )  # fmt: skip
        h_SF *= a1_SF
        d_a0_SF *= a1_SF
    d_a0_SF *= gate_S[:, None] * d_h_SF

    tl.store(gate_partial + (tile_f.to(tl.int64) * T + t_S) * K + k_S, tl.sum(h_SF * d_h_SF, 1), mask=valid_S)
    _store_slots(h, h_SF * gate_S[:, None], t_S, k_S, mask_SF, 1, h_k, T, f_F)
    _store_slots(d_a0, d_a0_SF, t_S, k_S, mask_SF, 1, d_a_k, T, f_F)
    store_choices(d_pre0, d_a0_SF, tile_t, T, C, f_F, in_F, KP, BS, BF)
    if GATED:
        _store_slots(d_a1, d_a1_SF, t_S, k_S, mask_SF, 1, d_a_k, T, f_F + SECOND)
        store_choices(d_pre1, d_a1_SF, tile_t, T, C, f_F + SECOND, in_F, KP, BS, BF)
    if HAS_BIAS:
        e_E = tl.arange(0, EB)
        own_ES = (e_E[:, None] == expert_S[None, :]).to(tl.float32)
        offset_EF = (tile_t.to(tl.int64) * E + e_E[:, None]) * C + f_F[None, :]
        mask_EF = (e_E < E)[:, None] & in_F[None, :]
        tl.store(bias_partial0 + offset_EF, tl.dot(own_ES, d_a0_SF, input_precision="ieee"), mask=mask_EF)
        if GATED:
            d_bias_EF = tl.dot(own_ES, d_a1_SF, input_precision="ieee")
            tl.store(bias_partial1 + offset_EF + SECOND, d_bias_EF, mask=mask_EF)


@triton.jit
def _sample(
    left, left_k, right, right_k, index, rows, columns, partial, N, T, E, tiles,
    K: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """partial[split, e, n] = the sum over own slots of left[k, row of n, t] · right[k, column of n, t]."""
    block, e, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    n_N = block * BN + tl.arange(0, BN)
    offset_N = e * N + n_N
    row_N = tl.load(rows + offset_N, mask=n_N < N, other=0).to(tl.int64)
    column_N = tl.load(columns + offset_N, mask=n_N < N, other=0).to(tl.int64)
    total_NT = tl.zeros((BN, BT), tl.float32)
    for tile in range(split * tiles, split * tiles + tiles):
        t_T = tile * BT + tl.arange(0, BT)
        left_at, right_at = left, right
        for k in range(K):
            own_T = tl.load(index + t_T.to(tl.int64) * K + k, mask=t_T < T, other=-1) == e
            mask_NT = (n_N < N)[:, None] & own_T[None, :]
            left_NT = tl.load(left_at + (row_N * T)[:, None] + t_T[None, :], mask=mask_NT, other=0)
            right_NT = tl.load(right_at + (column_N * T)[:, None] + t_T[None, :], mask=mask_NT, other=0)
            total_NT += left_NT.to(tl.float32) * right_NT.to(tl.float32)
            left_at += left_k
            right_at += right_k
    tl.store(partial + (split.to(tl.int64) * E + e) * N + n_N, tl.sum(total_NT, 1), mask=n_N < N)


class Transposed(NamedTuple):
    """Entries by columns, for the products with a transposed matrix: row of each entry; order by column; by that
    order, rows; boundaries of the columns. They follow from the support alone, so a caller may keep them."""

    entry_rows_EN: Tensor
    order_EN: Tensor
    rows_EN: Tensor
    column_starts_EQ: Tensor


def transpose_entries(columns_EN: Tensor, row_starts_EP: Tensor, num_columns: int) -> Transposed:
    """Compressed rows → compressed columns, without waiting for the device."""
    device, kept = columns_EN.device, columns_EN.shape[1]
    entry_EN = torch.arange(kept, device=device, dtype=torch.int32).expand(columns_EN.shape).contiguous()
    rows_EN = torch.searchsorted(row_starts_EP[:, 1:].contiguous(), entry_EN, right=True, out_int32=True)
    sorted_EN, order_EN = columns_EN.sort(dim=1, stable=True)
    bounds_Q = torch.arange(num_columns + 1, device=device, dtype=torch.int32)
    bounds_EQ = bounds_Q.expand(len(columns_EN), -1).contiguous()
    starts_EQ = torch.searchsorted(sorted_EN, bounds_EQ, out_int32=True)
    return Transposed(rows_EN, order_EN, rows_EN.gather(1, order_EN), starts_EQ)


def mix_sparse(
    x: Tensor,
    pre: list[Tensor],
    index: Tensor,
    gates: Tensor,
    values: list[Tensor],
    columns: list[Tensor],
    row_starts: list[Tensor],
    biases: list[Tensor],
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """Σ_k g h (T, F) and Σ_k g Δ_out,e h (T, O).

    With h = act(a_0) · a_1 (gated; gate's rows first where one projection holds both) or act(a_0), and
    a_j = pre_j + Δ_j,e x + bias_j,e.

    Args:
        x: (T, I).
        pre: (T, C) per input projection: x W_jᵀ.
        index: (T, K) experts, int64.
        gates: (T, K), fp32 or the type of `pre`.
        values, columns, row_starts: (E, N), (E, N) int32 and (E, P) int32 per projection, the output's last; entries
            ascend by row and column.
        biases: (E, C) per input projection, or none.
        activation: one of ACTIVATIONS.
    """
    check_activation(activation)
    check_floats(pre[0])
    tokens, top_k = index.shape
    hidden, out_features = pre[0].shape[1] // _halves(pre, gated), row_starts[-1].shape[1] - 1
    hbar, y = pre[0].new_empty(tokens, hidden), pre[0].new_empty(tokens, out_features)
    if tokens == 0:
        return hbar, y
    experts = len(row_starts[-1])
    x, h = _source(x), pre[0].new_empty(0)
    if tokens >= MANY_TOKENS:
        h = pre[0].new_empty(top_k, hidden, tokens).permute(2, 0, 1)
    else:
        h = pre[0].new_empty(tokens, top_k, hidden)
    entries = [[t.contiguous() for t in parts] for parts in zip(values, columns, row_starts, strict=True)]
    tile = _tiles(tokens, top_k, experts, pre[0].dtype)
    density = max(v.shape[1] / (s.shape[1] - 1) for v, _, s in entries[:-1])
    # Row tiles of the same tokens run together, so that what they read stays in the L2 cache.
    grid = triton.cdiv(hidden, _ROWS), triton.cdiv(tokens, tile["BS"] // tile["KP"])
    shared = [index.contiguous(), gates.contiguous()]
    _forward[grid](
        x, *x.stride(), pre[0].contiguous(), pre[-1].contiguous(), *shared, *entries[0], *entries[-2],
        *_ends(biases, h), hbar, h, *h.stride(), values[0].shape[1], values[-2].shape[1],
        tokens, hidden, pre[0].shape[1], experts, hidden * (_halves(pre, gated) - 1),
        GATED=gated, HAS_BIAS=bool(biases), ACT=activation, **tile, **_chunk(tile, density),
        LOG_BF=_LOG_ROWS,
    )  # fmt: skip
    _multiply([h], shared, [entries[-1]], y, tile)
    return hbar, y


def mix_sparse_backward(
    grad_hbar: Tensor,
    grad_y: Tensor,
    x: Tensor,
    pre: list[Tensor],
    index: Tensor,
    gates: Tensor,
    values: list[Tensor],
    columns: list[Tensor],
    row_starts: list[Tensor],
    biases: list[Tensor],
    activation: str,
    gated: bool,
    transposed: list[Transposed] | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """Gradients of x, pre, gates, values and biases, in the types of these; activations are computed again.

    Args:
        transposed: `transpose_entries` of each projection, where the caller kept them.
    """
    check_activation(activation)
    check_floats(pre[0])
    tokens, top_k = index.shape
    halves = _halves(pre, gated)
    features, width, hidden = x.shape[1], pre[0].shape[1], pre[0].shape[1] // halves
    experts = len(row_starts[-1])
    d_x, d_pre, d_gates = empty_as(x), [empty_as(p) for p in pre], empty_as(gates)
    d_values, d_biases = [empty_as(v) for v in values], [empty_as(b) for b in biases]
    if tokens == 0:
        for d in (*d_values, *d_biases):
            d.zero_()
        return d_x, d_pre, d_gates, d_values, d_biases
    if transposed is None:
        widths = [features] * len(pre) + [hidden]
        transposed = [transpose_entries(*parts) for parts in zip(columns, row_starts, widths, strict=True)]
    entries = [[t.contiguous() for t in parts] for parts in zip(values, columns, row_starts, strict=True)]
    by_column = [
        [v.gather(1, t.order_EN), t.rows_EN, t.column_starts_EQ] for v, t in zip(values, transposed, strict=True)
    ]
    tile = _tiles(tokens, top_k, experts, pre[0].dtype)
    tiles_t, tiles_f = triton.cdiv(tokens, tile["BS"] // tile["KP"]), triton.cdiv(hidden, _ROWS)
    # Tokens last throughout: both the products and the sampled sums read runs of neighbouring tokens.
    x_IT, grad_OT = x.T.contiguous(), grad_y.T.contiguous()
    h_KFT = pre[0].new_empty(top_k, hidden, tokens)
    d_a_KCT = [pre[0].new_empty(top_k, width, tokens) for _ in pre]
    gate_partial = x.new_empty(tiles_f, tokens, top_k, dtype=torch.float32)
    bias_partial = [x.new_empty(tiles_t, experts, width, dtype=torch.float32) for _ in biases]
    density = max(v.shape[1] / (s.shape[1] - 1) for v, _, s in (*entries[:-1], by_column[-1]))
    shared = [index.contiguous(), gates.contiguous()]
    _backward[tiles_f, tiles_t](
        grad_hbar.contiguous(), grad_OT, *grad_OT.T.stride(), *by_column[-1], values[-1].shape[1],
        x_IT, *x_IT.T.stride(), pre[0].contiguous(), pre[-1].contiguous(), *shared, *entries[0], *entries[-2],
        *_ends(biases, x), d_pre[0], d_pre[-1], gate_partial, *_ends(bias_partial, gate_partial),
        h_KFT, hidden * tokens, d_a_KCT[0], d_a_KCT[-1], width * tokens, values[0].shape[1], values[-2].shape[1],
        tokens, hidden, width, experts, hidden * (halves - 1),
        GATED=gated, HAS_BIAS=bool(biases), ACT=activation, **tile, **_chunk(tile, density),
        EB=max(16, tile["EP"]), LOG_BF=_LOG_ROWS,
    )  # fmt: skip
    _multiply([d.permute(2, 0, 1) for d in d_a_KCT], shared, by_column[:-1], d_x, tile)
    factors = [(d, width * tokens, x_IT, 0) for d in d_a_KCT] + [(grad_OT, 0, h_KFT, hidden * tokens)]
    for (left, left_k, right, right_k), t, own_columns, out in zip(factors, transposed, columns, d_values, strict=True):
        kept = own_columns.shape[1]
        blocks = triton.cdiv(kept, 16) * experts
        tiles = triton.cdiv(triton.cdiv(tokens, 64), max(1, 2 * common.PROGRAMS // blocks))
        splits = triton.cdiv(triton.cdiv(tokens, 64), tiles)
        partial = x.new_empty(splits, experts, kept, dtype=torch.float32)
        _sample[triton.cdiv(kept, 16), experts, splits](
            left, left_k, right, right_k, shared[0], t.entry_rows_EN, own_columns.contiguous(), partial,
            kept, tokens, experts, tiles, K=top_k, BN=16, BT=64,
        )  # fmt: skip
        sum_partials(partial, out)
    for partial, out in ((gate_partial, d_gates), *zip(bias_partial, d_biases, strict=True)):
        sum_partials(partial, out)
    return d_x, d_pre, d_gates, d_values, d_biases


def _multiply(
    sources: list[Tensor], shared: list[Tensor], entries: list[list[Tensor]], out: Tensor, tile: dict[str, int]
) -> None:
    """out[t] = Σ_j Σ_k Δ_j,e sources[j][t, k], of one or two matrices."""
    density = max(values.shape[1] / out.shape[1] for values, _, _ in entries)
    grid = triton.cdiv(out.shape[1], _ROWS), triton.cdiv(len(out), tile["BS"] // tile["KP"])
    _product[grid](
        sources[0], sources[-1], *sources[0].stride(), *shared, *entries[0], *entries[-1],
        out, entries[0][0].shape[1], entries[-1][0].shape[1], len(out), out.shape[1], len(entries[0][0]),
        TWO=len(sources) == 2, **tile, **_chunk(tile, density), LOG_BR=_LOG_ROWS,
    )  # fmt: skip


def _source(x: Tensor) -> Tensor:
    return x.T.contiguous().T if len(x) >= MANY_TOKENS else x.contiguous()


def _halves(pre: list[Tensor], gated: bool) -> int:
    """How many of gate and up the first projection holds."""
    return 2 if gated and len(pre) == 1 else 1


def _ends(tensors: list[Tensor], instead: Tensor) -> list[Tensor]:
    """The first and the last of one or two tensors; something of any type where there are none."""
    return [tensors[0].contiguous(), tensors[-1].contiguous()] if tensors else [instead, instead]


def _tiles(tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> dict[str, int]:
    kp = next_power(top_k)
    # fp32 products run outside the tensor cores and need more registers.
    slots = max(16, kp, min(32 if dtype == torch.float32 else 64, next_power(tokens * kp)))
    return {"K": top_k, "KP": kp, "EP": next_power(experts), "BS": slots, "num_warps": 4}


def _chunk(tile: dict[str, int], entries_per_row: float) -> dict[str, int]:
    """Entries of an expert taken at once: a run in most tiles, but no more of all experts than registers hold."""
    run = next_power(int(1.5 * entries_per_row * _ROWS) + 1)
    most = {16: 128, 32: 32}.get(tile["BS"], 64) // tile["EP"]
    return {"BN": max(triton.cdiv(16, tile["EP"]), min(run, most))}
