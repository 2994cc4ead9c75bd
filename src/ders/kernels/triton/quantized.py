"""Products of few slots with matrices stored as codes of 1, 2 or 4 bits: decode.

S slots, E experts, O/I out/in features, G groups of a matrix that share a grid, B bytes of a packed row, W words of one
(four bytes where rows are made of such, else one byte), Q slots of one expert taken together.

A word holds V neighbouring columns, so plane p of a tile of words (the p-th code of each) meets columns p, V + p,
2V + p, … of x: one small product a plane, and no code has to change its place.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ders.kernels.triton import common
from ders.kernels.triton.common import check_floats, next_power, own_slots, sum_partials

# Among so many slots each program looks for those of its expert.
_SLOTS = 128


@triton.jit
def _codes(word, PLANE: tl.constexpr, BITS: tl.constexpr):
    """The PLANE-th code of each word, less half a turn of its range (2**BITS / 2), as numbers."""
    SHIFT: tl.constexpr = PLANE * BITS % 16
    # Bits put below those of 2²³ are added to it: a mask and one multiplication make a code a number.
    part = word >> (PLANE * BITS - SHIFT)
    part = (part & (((1 << BITS) - 1) << SHIFT)) | 0x4B000000
    return part.to(tl.float32, bitcast=True) * (1 / 2**SHIFT) - (8388608 / 2**SHIFT + (1 << BITS) // 2)


@triton.jit
def _matvec(
    x, expert, codes, lows, steps, out, S, O, W, G, groups_per_row, words_per_group, words_per_split,
    BITS: tl.constexpr, VALUES: tl.constexpr, GROUPED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, BO: tl.constexpr, BW: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one expert with all of its slots: every word is read once.

    VALUES: codes in a word. GROUPED: a grid belongs to some columns of a row; else to a row (groups_per_row = 1) or to
    the matrix (0), and is applied to the sums.
    """
    tile_o, e = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split, start = tl.program_id(2) % SPLITS, tl.program_id(2) // SPLITS * BLOCK
    half: tl.constexpr = 1 << (BITS - 1)
    o_O = tile_o * BO + tl.arange(0, BO)
    in_O = o_O < O
    codes_O = codes + (e * O + o_O) * W
    grid_O = e * G + o_O.to(tl.int64) * groups_per_row
    slot_Q, valid_Q, count = own_slots(expert, e, start, S, 0, BLOCK, BQ)
    for first in range(0, count, BQ):
        slot_Q, valid_Q, count = own_slots(expert, e, start, S, first, BLOCK, BQ)
        x_Q = x + slot_Q * (W * VALUES)
        y_OQ = tl.zeros((BO, BQ), tl.float32)
        x_WQ = tl.zeros((BW, BQ), tl.float32)
        for begin in range(split * words_per_split, tl.minimum((split + 1) * words_per_split, W), BW):
            w_W = begin + tl.arange(0, BW)
            in_W = w_W < W
            mask_OW = in_O[:, None] & in_W[None, :]
            mask_WQ = in_W[:, None] & valid_Q[None, :]
            word_OW = tl.load(codes_O[:, None] + w_W[None, :], mask=mask_OW, other=0).to(tl.int32)
            if GROUPED:
                group_OW = grid_O[:, None] + (w_W // words_per_group)[None, :]
                low_OW = tl.load(lows + group_OW, mask=mask_OW, other=0).to(tl.float32)
                step_OW = tl.load(steps + group_OW, mask=mask_OW, other=0).to(tl.float32)
            for plane in tl.static_range(VALUES):
                value_OW = _codes(word_OW, plane, BITS)
                if GROUPED:
                    value_OW = low_OW + step_OW * (value_OW + half)
                plane_WQ = tl.load(x_Q[None, :] + (plane * W + w_W)[:, None], mask=mask_WQ, other=0)
                if not GROUPED:
                    x_WQ += plane_WQ
                y_OQ = tl.dot(value_OW.to(plane_WQ.dtype), plane_WQ, acc=y_OQ, input_precision="ieee")
        if not GROUPED:
            # Σ (low + step · code) x = step · Σ (code − half) x + (low + step · half) · Σ x
            step_O = tl.load(steps + grid_O, mask=in_O, other=0).to(tl.float32)
            low_O = tl.load(lows + grid_O, mask=in_O, other=0).to(tl.float32)
            y_OQ = y_OQ * step_O[:, None] + (low_O + step_O * half)[:, None] * tl.sum(x_WQ, 0)[None, :]
        offset_OQ = (split.to(tl.int64) * S + slot_Q)[None, :] * O + o_O[:, None]
        tl.store(out + offset_OQ, y_OQ.to(out.dtype.element_ty), mask=in_O[:, None] & valid_Q[None, :])


def quantized_matvec(
    x_SI: Tensor, expert_S: Tensor, codes_EOB: Tensor, bits: int, lows_EG: Tensor, steps_EG: Tensor
) -> Tensor:
    """y (S, O) with y_s = Δ_{e(s)} x_s, for few slots.

    Args:
        codes_EOB: little-endian within a byte, rows packed to whole bytes.
        bits: 1, 2 or 4.
        lows_EG, steps_EG: a weight is low + step · code; G is 1, O or a multiple of O.

    Raises:
        ValueError: other bits, or groups of columns that do not fill bytes.
    """
    check_floats(x_SI)
    slots, in_features = x_SI.shape
    experts, out_features, row_bytes = codes_EOB.shape
    groups_per_row, columns = group_columns(in_features, out_features, bits, lows_EG)
    y_SO = x_SI.new_empty(slots, out_features)
    if slots == 0:
        return y_SO
    codes_EOB, values = codes_EOB.contiguous(), 8 // bits
    if row_bytes % 4 == 0 and columns % (4 * values) == 0 and codes_EOB.data_ptr() % 4 == 0:
        codes_EOB, values = codes_EOB.view(torch.int32), 4 * values
    # Plane by plane, so that what meets a plane of codes lies together.
    x_SVW = F.pad(x_SI, (0, codes_EOB.shape[2] * values - in_features)).unflatten(1, (-1, values)).transpose(1, 2)
    words, active = codes_EOB.shape[2], min(experts, slots)
    # fp32 products run outside the tensor cores and need more registers.
    tile = {"BO": 32, "BW": 16, "BQ": 16} if x_SI.dtype == torch.float32 else {"BO": 64, "BW": 32, "BQ": 16}
    tiles_o = triton.cdiv(out_features, tile["BO"])
    # Rows alone may not give every multiprocessor enough programs to hide its loads' latency.
    splits = max(1, min(4, common.PROGRAMS // 2 // (active * tiles_o), words // (2 * tile["BW"])))
    per_split = triton.cdiv(triton.cdiv(words, splits), tile["BW"]) * tile["BW"]
    out = y_SO if splits == 1 else x_SI.new_empty(splits, slots, out_features, dtype=torch.float32)
    block = min(_SLOTS, next_power(slots, least=16))
    _matvec[tiles_o, experts, splits * triton.cdiv(slots, block)](
        x_SVW.contiguous(), expert_S.contiguous(), codes_EOB, lows_EG.contiguous(), steps_EG.contiguous(), out,
        slots, out_features, words, lows_EG.shape[1], groups_per_row, triton.cdiv(columns, values), per_split,
        BITS=bits, VALUES=values, GROUPED=groups_per_row > 1, SPLITS=splits, BLOCK=block, **tile,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return y_SO if splits == 1 else sum_partials(out, y_SO)


def group_columns(in_features: int, out_features: int, bits: int, lows_EG: Tensor) -> tuple[int, int]:
    """(Grids a row has: 0 where all rows share one; columns of a grid.)

    Raises:
        ValueError: other bits than 1, 2 and 4, or groups of columns that do not fill bytes.
    """
    if bits not in (1, 2, 4):
        raise ValueError(f"bits must be 1, 2 or 4: got {bits}")
    groups_per_row = lows_EG.shape[1] // out_features if lows_EG.shape[1] > 1 or out_features == 1 else 0
    if groups_per_row <= 1:
        # One grid a row, or none: no word crosses a boundary.
        return groups_per_row, triton.cdiv(in_features, 32) * 32
    columns = in_features // groups_per_row
    if columns * bits % 8:
        raise ValueError(f"a group must fill whole bytes: got {columns} columns of {bits} bits")
    return groups_per_row, columns
