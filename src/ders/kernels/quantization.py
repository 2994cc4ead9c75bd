"""Rounding to an evenly spaced grid, and products with E matrices stored as codes on such grids.

S slots, E experts, O/I out/in features, G groups of weights that share a grid, B bytes of a packed row.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ders.kernels.autocast import cast_for_matmul
from ders.kernels.packing import pack, packed_size, unpack

SCHEMES = ("uniform", "sign")
# Entries worked on at once: few enough to stay in a core's cache.
BLOCK = 1 << 17


def quantize(x_OI: Tensor, bits: int, groups: int, scheme: str, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(O, I) → packed codes (O, B) and, per group of the flattened matrix, origin (G,) and step (G,) of its grid.

    A weight is stored as the code of the nearest point of low + step · {0 … 2**bits − 1}. `uniform` spans the group's
    smallest to largest weight, or ± its largest magnitude if symmetric; `sign` is the 1-bit grid ± mean |x|, which
    is closest in the least-squares sense (BitDelta, 2402.10193). Origins and steps are bf16, and codes are chosen
    against the rounded ones.

    Args:
        groups: G; 1, or a multiple of O that divides O·I.
    """
    out_features, in_features = x_OI.shape
    codes_OB = x_OI.new_empty((out_features, packed_size(in_features, bits)), dtype=torch.uint8)
    lows, steps = [], []
    whole = None if groups > 1 else _grid(x_OI.reshape(1, -1), bits, scheme, symmetric)
    for rows in row_blocks(out_features, in_features):
        x = x_OI[rows].reshape(1, -1) if whole else x_OI[rows].reshape(-1, x_OI.numel() // groups)
        low, step = whole or _grid(x, bits, scheme, symmetric)
        inverse = torch.where(step > 0, 1 / step.float(), 0)[:, None]
        # Truncating x / step − low / step + ½ rounds it, in one pass fewer.
        codes = (x * inverse).add_(0.5 - low.float()[:, None] * inverse).clamp_(0, (1 << bits) - 1).to(torch.uint8)
        codes_OB[rows] = pack(codes.view(-1, in_features), bits)
        lows.append(low)
        steps.append(step)
    return (codes_OB, *whole) if whole else (codes_OB, torch.cat(lows), torch.cat(steps))


def _grid(x_GN: Tensor, bits: int, scheme: str, symmetric: bool) -> tuple[Tensor, Tensor]:
    levels = (1 << bits) - 1
    if scheme == "sign":
        return centred_grid((2 * x_GN.abs().mean(1)).to(torch.bfloat16), bits)
    low_G, high_G = x_GN.amin(1), x_GN.amax(1)
    if symmetric:
        return centred_grid((2 / levels * torch.maximum(-low_G, high_G)).to(torch.bfloat16), bits)
    return low_G.to(torch.bfloat16), ((high_G - low_G) / levels).to(torch.bfloat16)


def centred_grid(steps_G: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Origin and step of grids that lie evenly around zero: only the steps need storing."""
    return steps_G * (0.5 - (1 << bits) / 2), steps_G


def dequantize(codes_RB: Tensor, bits: int, in_features: int, lows: Tensor, steps: Tensor) -> Tensor:
    """Packed codes (R, B) → (R, I) in the type of origins and steps: a pair for all rows, or equally many for each."""
    codes = unpack(codes_RB, bits, in_features).reshape(len(lows), -1)
    return torch.addcmul(lows[:, None], codes.to(lows.dtype), steps[:, None]).view(len(codes_RB), in_features)


def row_blocks(rows: int, columns: int, size: int | None = None) -> Iterator[slice]:
    """Slices of consecutive rows, each of at most `size` entries (a core's cache holds BLOCK) and at least one row."""
    step = max(1, (size or BLOCK) // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def quantized_linear_oracle(
    x_SI: Tensor, expert_S: Tensor, codes_EOB: Tensor, bits: int, lows_EG: Tensor, steps_EG: Tensor
) -> Tensor:
    """Builds every matrix and multiplies slot by slot."""
    matrices = [
        dequantize(codes, bits, x_SI.shape[1], lows.to(x_SI.dtype), steps.to(x_SI.dtype))
        for codes, lows, steps in zip(codes_EOB, lows_EG, steps_EG, strict=True)
    ]
    return torch.einsum("soi,si->so", torch.stack(matrices)[expert_S], x_SI)


def quantized_linear(
    x_SI: Tensor, expert_S: Tensor, codes_EOB: Tensor, bits: int, lows_EG: Tensor, steps_EG: Tensor
) -> Tensor:
    """y (S, O) with y_s = Δ_{e(s)} x_s, differentiable in x; no more than a block of any matrix is ever built.

    On the CPU each expert meets its own slots only; elsewhere that would wait for the slot counts, so each expert runs
    over all slots with the others' masked.
    """
    (x_SI,) = cast_for_matmul(x_SI)
    result: Tensor = _QuantizedLinear.apply(x_SI, expert_S, codes_EOB, bits, lows_EG, steps_EG)
    return result


class _QuantizedLinear(torch.autograd.Function):
    """Keeps codes, not matrices, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, expert_S: Tensor, codes_EOB: Tensor, bits: int, *grids: Tensor) -> Tensor:
        ctx.save_for_backward(expert_S, codes_EOB, *grids)
        ctx.bits, ctx.in_features = bits, x_SI.shape[1]
        y_SO = x_SI.new_zeros(len(x_SI), codes_EOB.shape[1])
        for e, slots in _slots(expert_S, len(codes_EOB)):
            x = x_SI[slots] if x_SI.device.type == "cpu" else x_SI * slots[:, None]
            parts = [
                x @ w_RI.T
                for _, w_RI in _matrix_blocks(codes_EOB[e], bits, x, ctx.in_features, grids[0][e], grids[1][e])
            ]
            if x_SI.device.type == "cpu":
                y_SO[slots] = torch.cat(parts, 1)
            else:
                y_SO += torch.cat(parts, 1)
        return y_SO

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:
        expert_S, codes_EOB, *grids = ctx.saved_tensors
        grad_SI = grad_SO.new_zeros(len(grad_SO), ctx.in_features)
        for e, slots in _slots(expert_S, len(codes_EOB)):
            on_cpu = grad_SO.device.type == "cpu"
            grad = grad_SO[slots] if on_cpu else grad_SO * slots[:, None]
            # Summed over blocks in fp32: half precision would lose a little in each.
            mine = grad.new_zeros(len(grad), ctx.in_features, dtype=torch.promote_types(grad.dtype, torch.float32))
            for rows, w_RI in _matrix_blocks(codes_EOB[e], ctx.bits, grad, ctx.in_features, grids[0][e], grids[1][e]):
                mine += grad[:, rows] @ w_RI
            if on_cpu:
                grad_SI[slots] = mine.to(grad_SI.dtype)
            else:
                grad_SI += mine.to(grad_SI.dtype)
        return grad_SI, None, None, None, None, None


def _slots(expert_S: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    for e in range(num_experts):
        mine = expert_S == e
        yield e, mine.nonzero().flatten() if expert_S.device.type == "cpu" else mine


def _matrix_blocks(
    codes_OB: Tensor, bits: int, like: Tensor, in_features: int, lows_G: Tensor, steps_G: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a matrix, built in fp32 or wider and only then cast: fp16 cannot name the grids of small deltas."""
    out_features, wide = len(codes_OB), torch.promote_types(like.dtype, torch.float32)
    lows_G, steps_G = lows_G.to(wide), steps_G.to(wide)
    # A cache holds a block on the CPU; elsewhere each block costs launches.
    size = BLOCK if like.device.type == "cpu" else 64 * BLOCK
    for rows in row_blocks(out_features, in_features, size):
        per_row = len(lows_G) // out_features
        own = slice(rows.start * per_row, rows.stop * per_row) if per_row else slice(None)
        yield rows, dequantize(codes_OB[rows], bits, in_features, lows_G[own], steps_G[own]).to(like.dtype)
