"""Thin low-rank deltas, activation, gates and their gradients between the two products with the shared base.

T tokens, K top-k, S slots of a tile, E experts, R rank, F hidden width, C columns of an input projection (F, or 2F
where gate and up are one, gate first). Tiles of pairs (expert, rank index) also have C columns: powers of two.

With E·R of a few dozen, a product over all pairs (e, r), masked to the pairs of each slot's expert, costs the tensor
cores about a percent of the base and needs no sorting of slots. What is summed over the hidden width leaves as one
partial sum per tile of it, slot by slot ((tiles, T, K, R), not E·R), and is added up by a second launch.
"""

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
    spread_partials,
    store_choices,
    sum_partials,
)


@triton.jit
def _pairs(first, E, R, BR: tl.constexpr, CE: tl.constexpr):
    """Experts, rank indices and validity of the pairs of the CE experts from `first` on."""
    c_C = tl.arange(0, CE * BR)
    e_C = c_C // BR + first
    r_C = c_C % BR
    return e_C, r_C, (e_C < E) & (r_C < R)


@triton.jit
def _own_columns(z, t_S, expert_S, e_C, r_C, ok_C, E, R):
    """(S, ER) from (T, E·R): zero but for the slot's own expert."""
    own_SC = (expert_S[:, None] == e_C[None, :]) & ok_C[None, :]
    return tl.load(z + t_S[:, None] * (E * R) + (e_C * R + r_C)[None, :], mask=own_SC, other=0)


@triton.jit
def _left_factor(b, e_C, r_C, ok_C, row_F, in_F, C, R):
    """(ER, F) from (E, C, R)."""
    offset_CF = (e_C[:, None].to(tl.int64) * C + row_F[None, :]) * R + r_C[:, None]
    return tl.load(b + offset_CF, mask=ok_C[:, None] & in_F[None, :], other=0)


@triton.jit
def _right_factor(a_out, e_C, r_C, ok_C, f_F, in_F, F, R):
    """(ER, F) from (E, R, F)."""
    return tl.load(
        a_out + (e_C * R + r_C)[:, None].to(tl.int64) * F + f_F[None, :], mask=ok_C[:, None] & in_F[None, :], other=0
    )


@triton.jit
def _before_activation(
    pre, z, z_SC, b, b_CF, bias, t_S, valid_S, expert_S, row_F, in_F, C, E, R,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, BR: tl.constexpr, CE: tl.constexpr,
):  # fmt: skip
    """(S, F) in fp32: base + delta + bias. If one tile takes all experts (WHOLE), `z_SC` and `b_CF` are the delta."""
    mask_SF = valid_S[:, None] & in_F[None, :]
    a_SF = tl.load(pre + t_S[:, None] * C + row_F[None, :], mask=mask_SF, other=0).to(tl.float32)
    if HAS_BIAS:
        a_SF += tl.load(bias + expert_S[:, None].to(tl.int64) * C + row_F[None, :], mask=mask_SF, other=0)
    if WHOLE:
        a_SF = tl.dot(z_SC, b_CF, acc=a_SF, input_precision="ieee")
    else:
        for first in range(0, E, CE):
            e_C, r_C, ok_C = _pairs(first, E, R, BR, CE)
            own_SC = _own_columns(z, t_S, expert_S, e_C, r_C, ok_C, E, R)
            tile_CF = _left_factor(b, e_C, r_C, ok_C, row_F, in_F, C, R)
            a_SF = tl.dot(own_SC, tile_CF, acc=a_SF, input_precision="ieee")
    return a_SF


@triton.jit
def _own_pairs(x_SC, expert_S, e_C, BS: tl.constexpr, BR: tl.constexpr, CE: tl.constexpr):
    """(S, ER) → (S, R): the columns of the slot's own expert."""
    return tl.sum(tl.reshape(tl.where(expert_S[:, None] == e_C[None, :], x_SC, 0.0), (BS, CE, BR)), axis=1)


@triton.jit
def _store_slots(partial, x_SR, tile_f, t_S, k_S, valid_S, T, R, K: tl.constexpr, BR: tl.constexpr):
    r_R = tl.arange(0, BR)
    offset_SR = ((tile_f.to(tl.int64) * T + t_S) * K + k_S)[:, None] * R + r_R[None, :]
    tl.store(partial + offset_SR, x_SR, mask=valid_S[:, None] & (r_R < R)[None, :])


@triton.jit
def _forward(
    pre0, pre1, z0, z1, index, gates, b0, b1, a_out, bias0, bias1, hbar, z_partial, T, F, C, E, R, SECOND,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BR: tl.constexpr, CE: tl.constexpr, BS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    tile_t, tile_f = tl.program_id(0), tl.program_id(1)
    t_S, k_S, valid_S, expert_S, gate_S = slot_tile(index, gates, tile_t, T, K, KP, BS)
    f_F = tile_f * BF + tl.arange(0, BF)
    in_F = f_F < F
    a_SF = _before_activation(
        pre0, z0, None, b0, None, bias0, t_S, valid_S, expert_S, f_F, in_F, C, E, R, HAS_BIAS, False, BR, CE
    )  # fmt: skip
    h_SF, _ = activate(a_SF, ACT)
    if GATED:
        h_SF *= _before_activation(
            pre1, z1, None, b1, None, bias1, t_S, valid_S, expert_S, f_F + SECOND, in_F, C, E, R,
            HAS_BIAS, False, BR, CE,
        )  # fmt: skip
    h_SF *= gate_S[:, None]
    store_choices(hbar, h_SF, tile_t, T, F, f_F, in_F, KP, BS, BF)

    h_SF = h_SF.to(a_out.dtype.element_ty)
    z_SR = tl.zeros((BS, BR), tl.float32)
    for first in range(0, E, CE):
        e_C, r_C, ok_C = _pairs(first, E, R, BR, CE)
        a_CF = _right_factor(a_out, e_C, r_C, ok_C, f_F, in_F, F, R)
        z_SR += _own_pairs(tl.dot(h_SF, tl.trans(a_CF), input_precision="ieee"), expert_S, e_C, BS, BR, CE)
    _store_slots(z_partial, z_SR, tile_f, t_S, k_S, valid_S, T, R, K, BR)


@triton.jit
def _store_factor(partial, x_FC, split, e_C, r_C, ok_C, row_F, in_F, C, E, R):
    """Into (splits, E, C, R)."""
    offset_FC = ((split.to(tl.int64) * E + e_C[None, :]) * C + row_F[:, None]) * R + r_C[None, :]
    tl.store(partial + offset_FC, x_FC, mask=in_F[:, None] & ok_C[None, :])


@triton.jit
def _store_bias(partial, x_FC, split, e_C, r_C, ok_C, row_F, in_F, C, E):
    """Into (splits, E, C): every pair of an expert holds the same sum, its first is stored."""
    offset_FC = (split.to(tl.int64) * E + e_C[None, :]) * C + row_F[:, None]
    tl.store(partial + offset_FC, x_FC, mask=in_F[:, None] & (ok_C & (r_C == 0))[None, :])


@triton.jit
def _backward_projection(
    d_SF, z_SC, b, b_CF, d_pre, z_partial, d_b_FC, d_bias_FC, tile_t, tile_f, t_S, k_S, valid_S, expert_S,
    e_C, r_C, ok_C, row_F, in_F, T, C, E, R,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr,
    CE: tl.constexpr, BS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """From the gradient before the activation: those of the base and of z are stored, the factor's is returned."""
    narrow_SF = d_SF.to(b.dtype.element_ty)
    d_b_FC = tl.dot(tl.trans(narrow_SF), z_SC, acc=d_b_FC, input_precision="ieee")
    if HAS_BIAS:
        own_SC = (expert_S[:, None] == e_C[None, :]).to(narrow_SF.dtype)
        d_bias_FC = tl.dot(tl.trans(narrow_SF), own_SC, acc=d_bias_FC, input_precision="ieee")
    if WHOLE:
        store_choices(d_pre, d_SF, tile_t, T, C, row_F, in_F, KP, BS, BF)
        d_z_SC = tl.dot(narrow_SF, tl.trans(b_CF), input_precision="ieee")
        d_z_SR = _own_pairs(d_z_SC, expert_S, e_C, BS, BR, CE)
        _store_slots(z_partial, d_z_SR, tile_f, t_S, k_S, valid_S, T, R, K, BR)
    elif tl.program_id(2) == 0:
        store_choices(d_pre, d_SF, tile_t, T, C, row_F, in_F, KP, BS, BF)
        d_z_SR = tl.zeros((BS, BR), tl.float32)
        for first in range(0, E, CE):
            e2_C, r2_C, ok2_C = _pairs(first, E, R, BR, CE)
            tile_CF = _left_factor(b, e2_C, r2_C, ok2_C, row_F, in_F, C, R)
            d_z_SC = tl.dot(narrow_SF, tl.trans(tile_CF), input_precision="ieee")
            d_z_SR += _own_pairs(d_z_SC, expert_S, e2_C, BS, BR, CE)
        _store_slots(z_partial, d_z_SR, tile_f, t_S, k_S, valid_S, T, R, K, BR)
    return d_b_FC, d_bias_FC


@triton.jit
def _backward(
    grad_hbar, grad_z, pre0, pre1, z0, z1, index, gates, b0, b1, a_out, bias0, bias1,
    d_pre0, d_pre1, z_partial0, z_partial1, gate_partial, b_partial0, b_partial1, a_partial,
    bias_partial0, bias_partial1, T, F, C, E, R, SECOND, tiles,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, ACT: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, BR: tl.constexpr, CE: tl.constexpr, BS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """One tile of the hidden width and `tiles` tiles of slots, whose sums over slots stay in registers.

    Programs of the third axis differ in the experts whose factors' gradients they sum; the first stores all else.
    Where one tile takes all experts (WHOLE) there is one of them, and the factors are read once.
    """
    tile_f, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    f_F = tile_f * BF + tl.arange(0, BF)
    in_F = f_F < F
    e_C, r_C, ok_C = _pairs(part * CE, E, R, BR, CE)
    a_CF = _right_factor(a_out, e_C, r_C, ok_C, f_F, in_F, F, R)
    b0_CF = _left_factor(b0, e_C, r_C, ok_C, f_F, in_F, C, R)
    b1_CF = _left_factor(b1, e_C, r_C, ok_C, f_F + SECOND, in_F, C, R)
    # The short side last: a tensor core's tile is longer than wide, and a tile shorter than it is held many times over.
    d_a_FC = tl.zeros((BF, CE * BR), tl.float32)
    d_b0_FC = tl.zeros((BF, CE * BR), tl.float32)
    d_b1_FC = tl.zeros((BF, CE * BR), tl.float32)
    d_bias0_FC = tl.zeros((BF, CE * BR), tl.float32)
    d_bias1_FC = tl.zeros((BF, CE * BR), tl.float32)
    for tile_t in range(split * tiles, split * tiles + tiles):
        t_S, k_S, valid_S, expert_S, gate_S = slot_tile(index, gates, tile_t, T, K, KP, BS)
        grad_SC = _own_columns(grad_z, t_S, expert_S, e_C, r_C, ok_C, E, R)
        # The gradient of what the output projection reads, before the gate.
        mask_SF = valid_S[:, None] & in_F[None, :]
        d_h_SF = tl.load(grad_hbar + t_S[:, None] * F + f_F[None, :], mask=mask_SF, other=0).to(tl.float32)
        if WHOLE:
            d_h_SF = tl.dot(grad_SC, a_CF, acc=d_h_SF, input_precision="ieee")
        else:
            for first in range(0, E, CE):
                e2_C, r2_C, ok2_C = _pairs(first, E, R, BR, CE)
                grad2_SC = _own_columns(grad_z, t_S, expert_S, e2_C, r2_C, ok2_C, E, R)
                a2_CF = _right_factor(a_out, e2_C, r2_C, ok2_C, f_F, in_F, F, R)
                d_h_SF = tl.dot(grad2_SC, a2_CF, acc=d_h_SF, input_precision="ieee")

        z0_SC = _own_columns(z0, t_S, expert_S, e_C, r_C, ok_C, E, R)
        a0_SF = _before_activation(
            pre0, z0, z0_SC, b0, b0_CF, bias0, t_S, valid_S, expert_S, f_F, in_F, C, E, R, HAS_BIAS, WHOLE, BR, CE
        )  # fmt: skip
        h_SF, d_a0_SF = activate(a0_SF, ACT)
        d_a1_SF = h_SF * gate_S[:, None] * d_h_SF
        if GATED:
            z1_SC = _own_columns(z1, t_S, expert_S, e_C, r_C, ok_C, E, R)
            a1_SF = _before_activation(
                pre1, z1, z1_SC, b1, b1_CF, bias1, t_S, valid_S, expert_S, f_F + SECOND, in_F, C, E, R,
                HAS_BIAS, WHOLE, BR, CE,
            )  # fmt: skip
            h_SF *= a1_SF
            d_a0_SF *= a1_SF
        d_a0_SF *= gate_S[:, None] * d_h_SF

        if part == 0:
            offset_S = (tile_f.to(tl.int64) * T + t_S) * K + k_S
            tl.store(gate_partial + offset_S, tl.sum(h_SF * d_h_SF, 1), mask=valid_S)
        h_SF = (h_SF * gate_S[:, None]).to(a_out.dtype.element_ty)
        d_a_FC = tl.dot(tl.trans(h_SF), grad_SC, acc=d_a_FC, input_precision="ieee")
        d_b0_FC, d_bias0_FC = _backward_projection(
            d_a0_SF, z0_SC, b0, b0_CF, d_pre0, z_partial0, d_b0_FC, d_bias0_FC, tile_t, tile_f, t_S, k_S, valid_S,
            expert_S, e_C, r_C, ok_C, f_F, in_F, T, C, E, R, HAS_BIAS, WHOLE, K, KP, BR, CE, BS, BF,
        )  # fmt: skip
        if GATED:
            d_b1_FC, d_bias1_FC = _backward_projection(
                d_a1_SF, z1_SC, b1, b1_CF, d_pre1, z_partial1, d_b1_FC, d_bias1_FC, tile_t, tile_f, t_S, k_S, valid_S,
                expert_S, e_C, r_C, ok_C, f_F + SECOND, in_F, T, C, E, R, HAS_BIAS, WHOLE, K, KP, BR, CE, BS, BF,
            )  # fmt: skip

    offset_FC = ((split.to(tl.int64) * E + e_C) * R + r_C)[None, :] * F + f_F[:, None]
    tl.store(a_partial + offset_FC, d_a_FC, mask=in_F[:, None] & ok_C[None, :])
    _store_factor(b_partial0, d_b0_FC, split, e_C, r_C, ok_C, f_F, in_F, C, E, R)
    if GATED:
        _store_factor(b_partial1, d_b1_FC, split, e_C, r_C, ok_C, f_F + SECOND, in_F, C, E, R)
    if HAS_BIAS:
        _store_bias(bias_partial0, d_bias0_FC, split, e_C, r_C, ok_C, f_F, in_F, C, E)
        if GATED:
            _store_bias(bias_partial1, d_bias1_FC, split, e_C, r_C, ok_C, f_F + SECOND, in_F, C, E)


def _tiles(tokens: int, top_k: int, experts: int, rank: int) -> dict[str, int]:
    """At decode narrow tiles, so that every multiprocessor has one; else as much as registers hold."""
    kp, br = next_power(top_k), next_power(rank)
    slots = max(16, kp, min(64, next_power(tokens * kp)))
    # A product has at least 16 pairs; more than 64 would not leave registers for the rest.
    together = max(16 // br, 1, min(next_power(experts), 64 // br))
    wide = slots == 64 and br <= 64
    return {"K": top_k, "KP": kp, "BR": br, "CE": together, "BS": slots, "BF": 64 if wide else 32}


def mix_low_rank(
    pre: list[Tensor],
    z: list[Tensor],
    index: Tensor,
    gates: Tensor,
    b: list[Tensor],
    a_out: Tensor,
    biases: list[Tensor],
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """Σ_k g h (T, F) and, in the columns of each choice's expert, g A_out,e h (T, E·R).

    With h = act(a_0) · a_1 (gated; gate's rows first where one projection holds both) or act(a_0), and
    a_j = pre_j + B_j,e z_j,e + bias_j,e.

    Args:
        pre: (T, C) per input projection: x W_jᵀ.
        z: (T, E·R) per input projection: x A_jᵀ for all experts.
        index: (T, K) experts, int64.
        gates: (T, K), fp32 or the type of `pre`.
        b: (E, C, R) per input projection.
        a_out: (E, R, F).
        biases: (E, C) per input projection, or none.
        activation: one of ACTIVATIONS.
    """
    check_activation(activation)
    check_floats(pre[0])
    experts, rank, hidden = a_out.shape
    tokens, top_k = index.shape
    hbar = pre[0].new_empty(tokens, hidden)
    z_out = pre[0].new_empty(tokens, experts * rank)
    if tokens == 0:
        return hbar, z_out
    tile = _tiles(tokens, top_k, experts, rank)
    grid = triton.cdiv(tokens, tile["BS"] // tile["KP"]), triton.cdiv(hidden, tile["BF"])
    partial = hbar.new_empty(grid[1], tokens, top_k, rank, dtype=torch.float32)
    index, inputs = index.contiguous(), _inputs(pre, z, index, gates, b, a_out, biases)
    _forward[grid](
        *inputs, hbar, partial, tokens, hidden, pre[0].shape[1], experts, rank, _second(pre, hidden, gated),
        GATED=gated, HAS_BIAS=bool(biases), ACT=activation, **tile, num_warps=_warps(tile),
    )  # fmt: skip
    return hbar, spread_partials(partial, index, z_out)


def mix_low_rank_backward(
    grad_hbar: Tensor,
    grad_z_out: Tensor,
    pre: list[Tensor],
    z: list[Tensor],
    index: Tensor,
    gates: Tensor,
    b: list[Tensor],
    a_out: Tensor,
    biases: list[Tensor],
    activation: str,
    gated: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Gradients of pre, z, gates, b, a_out and biases, in the types of these; activations are computed again."""
    check_activation(activation)
    check_floats(pre[0])
    experts, rank, hidden = a_out.shape
    tokens, top_k = index.shape
    columns = pre[0].shape[1]
    d_pre, d_z, d_gates = [empty_as(p) for p in pre], [empty_as(x) for x in z], empty_as(gates)
    d_b, d_a_out, d_biases = (
        [empty_as(x) for x in b],
        empty_as(a_out),
        [empty_as(bias) for bias in biases],
    )
    if tokens == 0:
        for d in (*d_b, d_a_out, *d_biases):
            d.zero_()
        return d_pre, d_z, d_gates, d_b, d_a_out, d_biases
    tile = _tiles(tokens, top_k, experts, rank)
    tiles_f, tiles_t = triton.cdiv(hidden, tile["BF"]), triton.cdiv(tokens, tile["BS"] // tile["KP"])
    # Enough programs for every multiprocessor to hide its loads' latency, few enough for short sums over them.
    tiles = triton.cdiv(tiles_t, max(1, common.PROGRAMS // tiles_f))
    splits = triton.cdiv(tiles_t, tiles)

    def partial(*shape: int) -> Tensor:
        return grad_hbar.new_empty(shape, dtype=torch.float32)

    sides = 2 if gated else 1
    z_partial = partial(sides, tiles_f, tokens, top_k, rank)
    gate_partial = partial(tiles_f, tokens, top_k)
    b_partial = [partial(splits, experts, columns, rank) for _ in b]
    a_partial = partial(splits, experts, rank, hidden)
    bias_partial = [partial(splits, experts, columns) for _ in biases] or [a_partial]
    index = index.contiguous()
    parts = triton.cdiv(experts, tile["CE"])
    _backward[tiles_f, splits, parts](
        grad_hbar.contiguous(), grad_z_out.contiguous(), *_inputs(pre, z, index, gates, b, a_out, biases),
        d_pre[0], d_pre[-1], z_partial[0], z_partial[-1], gate_partial, b_partial[0], b_partial[-1], a_partial,
        bias_partial[0], bias_partial[-1],
        tokens, hidden, columns, experts, rank, _second(pre, hidden, gated), tiles,
        GATED=gated, HAS_BIAS=bool(biases), WHOLE=parts == 1, ACT=activation,
        **tile, num_warps=_warps(tile), num_stages=1,
    )  # fmt: skip
    # One projection that holds gate and up has both sides' sums.
    z_parts = z_partial.view(len(z), -1, tokens, top_k, rank)
    for part, out in zip(z_parts, d_z, strict=True):
        spread_partials(part, index, out)
    sums = [(gate_partial, d_gates), (a_partial, d_a_out), *zip(b_partial, d_b, strict=True)]
    for part, out in (*sums, *zip(bias_partial, d_biases, strict=False)):
        sum_partials(part, out)
    return d_pre, d_z, d_gates, d_b, d_a_out, d_biases


def _inputs(
    pre: list[Tensor],
    z: list[Tensor],
    index: Tensor,
    gates: Tensor,
    b: list[Tensor],
    a_out: Tensor,
    biases: list[Tensor],
) -> list[Tensor]:
    """As the kernels take them: the first and the last of each list, which one projection makes the same."""
    pairs = [t.contiguous() for tensors in (pre, z) for t in (tensors[0], tensors[-1])]
    factors = [t.contiguous() for t in (b[0], b[-1], a_out)]
    ends = [bias.contiguous() for bias in (biases[0], biases[-1])] if biases else [a_out, a_out]
    return [*pairs, index, gates.contiguous(), *factors, *ends]


def _second(pre: list[Tensor], hidden: int, gated: bool) -> int:
    """At which row of its projection up begins."""
    return hidden if gated and len(pre) == 1 else 0


def _warps(tile: dict[str, int]) -> int:
    return 8 if tile["BS"] * tile["BF"] >= 4096 else 4
