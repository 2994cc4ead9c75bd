"""Rounding to an evenly spaced grid, and products with E matrices stored as codes on such grids.

S slots, E experts, O/I out/in features, G groups of weights that share a grid, B bytes of a packed row.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ders.kernels.autocast import cast_for_matmul
from ders.kernels.forms import Coded
from ders.kernels.gpu import on_gpu, takes_codes
from ders.kernels.native.library import call, usable
from ders.kernels.packing import pack, packed_size, unpack

SCHEMES = ("uniform", "sign")
# Entries worked on at once: few enough to stay in a core's cache.
BLOCK = 1 << 17
# Compiled code and a matrix product take turns at a block: large enough for the product, small enough for the cache.
NATIVE_BLOCK = 1 << 19
# Slots of an expert, on average, up to which one pass in compiled code beats blocks and a matrix product.
FEW = 24


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

    Compiled code runs few slots in one pass over the codes. Many, and all without a compiler, run through blocks: on
    the CPU each expert over its own slots; elsewhere that would wait for the slot counts, so each expert runs over all
    slots with the others' masked.
    """
    (x_SI,) = cast_for_matmul(x_SI)
    # The one place where the device decides. On a GPU there is a product for decoding, which needs no gradients.
    known = on_gpu(x_SI) and takes_codes(Coded(codes_EOB, bits, lows_EG, steps_EG))
    if usable(x_SI.device.type, x_SI.dtype) or (known and not torch.is_grad_enabled()):
        result: Tensor = _native(x_SI, expert_S, codes_EOB, bits, lows_EG.float(), steps_EG.float())
    else:
        result = _QuantizedLinear.apply(x_SI, expert_S, codes_EOB, bits, lows_EG, steps_EG)
    return result


@torch.library.custom_op("ders::quantized_linear", mutates_args=())
def _native(x_SI: Tensor, expert_S: Tensor, codes_EOB: Tensor, bits: int, lows_EG: Tensor, steps_EG: Tensor) -> Tensor:
    if x_SI.is_cuda:
        from ders.kernels.triton import quantized_matvec

        return quantized_matvec(x_SI, expert_S, codes_EOB, bits, lows_EG, steps_EG)
    if len(x_SI) <= FEW * len(codes_EOB):
        return coded_product(x_SI, expert_S, None, codes_EOB, bits, lows_EG, steps_EG)
    return _by_blocks(x_SI, expert_S, codes_EOB, bits, lows_EG, steps_EG)


@_native.register_fake
def _(x_SI: Tensor, expert_S: Tensor, codes_EOB: Tensor, bits: int, lows_EG: Tensor, steps_EG: Tensor) -> Tensor:
    return x_SI.new_empty(len(x_SI), codes_EOB.shape[1])


@torch.library.custom_op("ders::quantized_linear_backward", mutates_args=())
def _native_backward(
    grad_SO: Tensor,
    expert_S: Tensor,
    codes_EOB: Tensor,
    bits: int,
    lows_EG: Tensor,
    steps_EG: Tensor,
    in_features: int,
) -> Tensor:
    return _transposed_by_blocks(grad_SO, expert_S, codes_EOB, bits, lows_EG, steps_EG, in_features)


@_native_backward.register_fake
def _(
    grad_SO: Tensor,
    expert_S: Tensor,
    codes_EOB: Tensor,
    bits: int,
    lows_EG: Tensor,
    steps_EG: Tensor,
    in_features: int,
) -> Tensor:
    return grad_SO.new_empty(len(grad_SO), in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_SI, expert_S, codes_EOB, ctx.bits, *grids = inputs
    ctx.in_features = x_SI.shape[1]
    ctx.save_for_backward(expert_S, codes_EOB, *grids)


def _gradient(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:
    expert_S, codes_EOB, *grids = ctx.saved_tensors
    grad_SI = _native_backward(grad_SO, expert_S, codes_EOB, ctx.bits, *grids, ctx.in_features)
    return grad_SI, None, None, None, None, None


_native.register_autograd(_gradient, setup_context=_keep)


class _QuantizedLinear(torch.autograd.Function):
    """The same in torch operations. Keeps codes, not matrices, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, expert_S: Tensor, codes_EOB: Tensor, bits: int, *grids: Tensor) -> Tensor:
        _keep(ctx, (x_SI, expert_S, codes_EOB, bits, *grids), x_SI)
        return _by_blocks(x_SI, expert_S, codes_EOB, bits, *grids)

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:
        expert_S, codes_EOB, lows_EG, steps_EG = ctx.saved_tensors
        grad_SI = _transposed_by_blocks(grad_SO, expert_S, codes_EOB, ctx.bits, lows_EG, steps_EG, ctx.in_features)
        return grad_SI, None, None, None, None, None


def _by_blocks(
    x_SI: Tensor, expert_S: Tensor, codes_EOB: Tensor, bits: int, lows_EG: Tensor, steps_EG: Tensor
) -> Tensor:
    y_SO = x_SI.new_zeros(len(x_SI), codes_EOB.shape[1])
    on_cpu = x_SI.device.type == "cpu"
    for e, slots in _slots(expert_S, len(codes_EOB)):
        x = x_SI[slots] if on_cpu else x_SI * slots[:, None]
        y = x.new_empty(len(x), y_SO.shape[1])
        for rows, w_RI in _matrix_blocks(x, codes_EOB[e], bits, x_SI.shape[1], lows_EG[e], steps_EG[e]):
            y[:, rows] = x @ w_RI.T
        if on_cpu:
            y_SO[slots] = y
        else:
            y_SO += y
    return y_SO


def _transposed_by_blocks(
    grad_SO: Tensor,
    expert_S: Tensor,
    codes_EOB: Tensor,
    bits: int,
    lows_EG: Tensor,
    steps_EG: Tensor,
    in_features: int,
) -> Tensor:
    grad_SI = grad_SO.new_zeros(len(grad_SO), in_features)
    on_cpu = grad_SO.device.type == "cpu"
    for e, slots in _slots(expert_S, len(codes_EOB)):
        grad = grad_SO[slots] if on_cpu else grad_SO * slots[:, None]
        # Summed over blocks in fp32: half precision would lose a little in each.
        mine = grad.new_zeros(len(grad), in_features, dtype=torch.promote_types(grad.dtype, torch.float32))
        for rows, w_RI in _matrix_blocks(grad, codes_EOB[e], bits, in_features, lows_EG[e], steps_EG[e]):
            mine += grad[:, rows] @ w_RI
        if on_cpu:
            grad_SI[slots] = mine.to(grad_SI.dtype)
        else:
            grad_SI += mine.to(grad_SI.dtype)
    return grad_SI


def _slots(expert_S: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert with its slots: their indices on the CPU, where an expert without any is left out, else a mask."""
    for e in range(num_experts):
        mine = expert_S == e
        if expert_S.device.type != "cpu":
            yield e, mine
        elif len(slots := mine.nonzero().flatten()):
            yield e, slots


def _matrix_blocks(
    like: Tensor, codes_OB: Tensor, bits: int, in_features: int, lows_G: Tensor, steps_G: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a matrix, built in fp32 or wider and only then cast: fp16 cannot name the grids of small deltas."""
    out_features = len(codes_OB)
    if usable(like.device.type, like.dtype):
        grids = (lows_G.float()[None], steps_G.float()[None])
        block = like.new_empty(min(out_features, max(1, NATIVE_BLOCK // in_features)), in_features)
        for rows in row_blocks(out_features, in_features, NATIVE_BLOCK):
            w_RI = block[: rows.stop - rows.start]
            coded_rows(0, rows, None, codes_OB[None], bits, *grids, w_RI)
            yield rows, w_RI
        return
    wide = torch.promote_types(like.dtype, torch.float32)
    lows_G, steps_G = lows_G.to(wide), steps_G.to(wide)
    # A cache holds a block on the CPU; elsewhere each block costs launches.
    size = BLOCK if like.device.type == "cpu" else 64 * BLOCK
    for rows in row_blocks(out_features, in_features, size):
        per_row = len(lows_G) // out_features
        own = slice(rows.start * per_row, rows.stop * per_row) if per_row else slice(None)
        yield rows, dequantize(codes_OB[rows], bits, in_features, lows_G[own], steps_G[own]).to(like.dtype)


def coded_product(
    x_SI: Tensor,
    expert_S: Tensor,
    weight_OI: Tensor | None,
    codes_EOB: Tensor,
    bits: int,
    lows_EG: Tensor,
    steps_EG: Tensor,
) -> Tensor:
    """y_s = (W + Δ_{e(s)}) x_s in compiled code, which makes a few rows at a time: the fastest way for few slots."""
    experts, out_features, row_bytes = codes_EOB.shape
    y_SO = x_SI.new_empty(len(x_SI), out_features)
    weight = 0 if weight_OI is None else weight_OI.contiguous()
    codes = (codes_EOB.contiguous(), lows_EG.contiguous(), steps_EG.contiguous())
    sizes = (len(x_SI), experts, out_features, x_SI.shape[1], row_bytes, lows_EG.shape[1])
    call("coded_product", x_SI.dtype, x_SI.contiguous(), expert_S.contiguous(), weight, *codes, y_SO, bits, *sizes)
    return y_SO


def coded_rows(
    expert: int,
    rows: slice,
    weight_OI: Tensor | None,
    codes_EOB: Tensor,
    bits: int,
    lows_EG: Tensor,
    steps_EG: Tensor,
    out_RI: Tensor,
) -> None:
    """out = rows of W + Δ_e, in compiled code."""
    _, out_features, row_bytes = codes_EOB.shape
    weight = 0 if weight_OI is None else weight_OI.contiguous()
    codes = (codes_EOB.contiguous(), lows_EG.contiguous(), steps_EG.contiguous())
    sizes = (out_features, out_RI.shape[1], row_bytes, lows_EG.shape[1], expert, rows.start, rows.stop)
    call("coded_rows", out_RI.dtype, weight, *codes, out_RI, bits, *sizes)
