"""What all the kernels share: activations, the expert's slots, sums of partial results, choices of tile sizes.

A slot is a token and one of its choices. Tiles of slots count choices in powers of two: slot s of a tile is choice
s mod KP of token s div KP, and slots beyond the true top-k are masked, as are those beyond the last token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs to start where their number is free: four for each multiprocessor of an H200.
PROGRAMS = 528

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "identity")


@triton.jit
def activate(x, ACT: tl.constexpr):
    """(activation, its derivative), in fp32."""
    if ACT == "silu":
        gate = tl.sigmoid(x)
        value = x * gate
        slope = gate * (1 + x * (1 - gate))
    elif ACT == "gelu":
        cumulative = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * cumulative
        slope = cumulative + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        # ½ (1 + tanh u) is the sigmoid of 2u.
        square = x * x
        gate = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * square))
        value = x * gate
        slope = gate + x * gate * (1 - gate) * 1.5957691216057308 * (1 + 0.134145 * square)
    elif ACT == "relu":
        value = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        value = x
        slope = x * 0 + 1
    return value, slope


@triton.jit
def slot_tile(index, gates, tile, T, K: tl.constexpr, KP: tl.constexpr, BS: tl.constexpr):
    """Tokens (int64), choices, validity, experts (−1 where invalid) and gates (0 where invalid) of a tile of slots."""
    s_S = tl.arange(0, BS)
    t_S = (s_S // KP).to(tl.int64) + tile * (BS // KP)
    k_S = s_S % KP
    valid_S = (t_S < T) & (k_S < K)
    expert_S = tl.load(index + t_S * K + k_S, mask=valid_S, other=-1).to(tl.int32)
    gate_S = tl.load(gates + t_S * K + k_S, mask=valid_S, other=0).to(tl.float32)
    return t_S, k_S, valid_S, expert_S, gate_S


@triton.jit
def store_choices(
    out, x_SN, tile, T, N, column_N, in_N, KP: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """out[t, column] = the sum of x over the choices of t; out is (T, N)."""
    t_T = tl.arange(0, BS // KP).to(tl.int64) + tile * (BS // KP)
    x_TN = tl.sum(tl.reshape(x_SN, (BS // KP, KP, BN)), axis=1)
    mask_TN = (t_T < T)[:, None] & in_N[None, :]
    tl.store(out + t_T[:, None] * N + column_N[None, :], x_TN.to(out.dtype.element_ty), mask=mask_TN)


@triton.jit
def own_slots(expert, e, start, S, first, BLOCK: tl.constexpr, BQ: tl.constexpr):
    """The slots of expert e among BLOCK from `start` on: those of rank first … first + BQ − 1, and how many there are.

    Found by every program for itself, which spares a sort, its launches, and any wait for the host.
    """
    s_S = start + tl.arange(0, BLOCK)
    mine_S = (tl.load(expert + s_S, mask=s_S < S, other=-1) == e).to(tl.int32)
    rank_S = tl.cumsum(mine_S, 0) - 1
    wanted_Q = first + tl.arange(0, BQ)
    hit_SQ = (mine_S[:, None] > 0) & (rank_S[:, None] == wanted_Q[None, :])
    slot_Q = tl.sum(tl.where(hit_SQ, s_S[:, None], 0), 0).to(tl.int64)
    count = tl.sum(mine_S, 0)
    return slot_Q, wanted_Q < count, count


@triton.jit
def _sum_partials(partial, out, P, N, BP: tl.constexpr, BN: tl.constexpr):
    n_N = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    total_PN = tl.zeros((BP, BN), tl.float32)
    for first in range(0, P, BP):
        p_P = first + tl.arange(0, BP)
        mask_PN = (p_P[:, None] < P) & (n_N[None, :] < N)
        total_PN += tl.load(partial + p_P[:, None].to(tl.int64) * N + n_N[None, :], mask=mask_PN, other=0)
    tl.store(out + n_N, tl.sum(total_PN, 0).to(out.dtype.element_ty), mask=n_N < N)


@triton.jit
def _spread_partials(partial, index, out, P, T, E, R, K: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """(P, T, K, R) → (T, E·R): the sum over P, each choice in the columns of its expert."""
    n_N = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    t_N, column_N = n_N // (E * R), n_N % (E * R)
    total_PN = tl.zeros((BP, BN), tl.float32)
    for k in range(K):
        own_N = tl.load(index + t_N * K + k, mask=t_N < T, other=-1) == column_N // R
        source_N = (t_N * K + k) * R + column_N % R
        for first in range(0, P, BP):
            p_P = first + tl.arange(0, BP)
            mask_PN = (p_P[:, None] < P) & own_N[None, :]
            offset_PN = p_P[:, None].to(tl.int64) * (T * K * R) + source_N[None, :]
            total_PN += tl.load(partial + offset_PN, mask=mask_PN, other=0)
    tl.store(out + n_N, tl.sum(total_PN, 0).to(out.dtype.element_ty), mask=t_N < T)


def sum_partials(partial: Tensor, out: Tensor) -> Tensor:
    """out = Σ_p partial[p], with partial (P, …) in fp32 and rounded once."""
    tile = _partial_tile(len(partial))
    if out.numel():
        grid = (triton.cdiv(out.numel(), tile["BN"]),)
        _sum_partials[grid](partial, out, len(partial), out.numel(), **tile)
    return out


def spread_partials(partial: Tensor, index_TK: Tensor, out: Tensor) -> Tensor:
    """out[t, e·R + r] = the sum of partial[:, t, k, r] over the choices k that name e; partial (P, T, K, R) in fp32."""
    count, tokens, top_k, rank = partial.shape
    tile = _partial_tile(count)
    if out.numel():
        grid = (triton.cdiv(out.numel(), tile["BN"]),)
        _spread_partials[grid](partial, index_TK, out, count, tokens, out.shape[1] // rank, rank, K=top_k, **tile)
    return out


def _partial_tile(count: int) -> dict[str, int]:
    # Loads of a tile are in flight together: a loop over many partial sums would wait for each.
    rows = min(next_power(count), 64)
    return {"BP": rows, "BN": max(32, 2048 // rows)}


def empty_as(x: Tensor) -> Tensor:
    """Of the shape and type of `x`, and contiguous whatever its strides."""
    return x.new_empty(x.shape)


def next_power(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n, and at least `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}: got {activation!r}")


def check_floats(x: Tensor) -> None:
    """The tensor cores and the sums here know three types."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"the kernels for a GPU take float32, bfloat16 and float16: got {x.dtype}")
