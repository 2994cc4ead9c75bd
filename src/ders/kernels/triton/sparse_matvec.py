"""Products of few slots with thick sparse matrices (a tenth of the entries, say): decode.

S slots, E experts, O/I out/in features, N kept entries of a matrix, P = O + 1, Q slots of one expert taken together.
"""

import triton
import triton.language as tl
from torch import Tensor

from ders.kernels.triton.common import check_floats, next_power, own_slots

# Among so many slots each program looks for those of its expert.
_SLOTS = 128


@triton.jit
def _matvec(
    x, expert, values, columns, row_starts, out, S, I, O, N,
    BLOCK: tl.constexpr, BO: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """A few rows of one expert with its slots, BQ at a time; entries of all rows advance together."""
    tile_o, e, start = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK
    o_O = tile_o * BO + tl.arange(0, BO)
    in_O = o_O < O
    slot_Q, valid_Q, count = own_slots(expert, e, start, S, 0, BLOCK, BQ)
    if count > 0:
        starts_O = row_starts + e * (O + 1) + o_O
        begin_O = tl.load(starts_O, mask=in_O, other=0)
        end_O = tl.load(starts_O + 1, mask=in_O, other=0)
        longest = tl.max(end_O - begin_O, 0)
        for first in range(0, count, BQ):
            slot_Q, valid_Q, count = own_slots(expert, e, start, S, first, BLOCK, BQ)
            total_ONQ = tl.zeros((BO, BN, BQ), tl.float32)
            for passed in range(0, longest, BN):
                n_ON = begin_O[:, None] + passed + tl.arange(0, BN)[None, :]
                there_ON = n_ON < end_O[:, None]
                column_ON = tl.load(columns + e * N + n_ON, mask=there_ON, other=0)
                value_ON = tl.load(values + e * N + n_ON, mask=there_ON, other=0).to(tl.float32)
                read_ONQ = tl.load(
                    x + (slot_Q * I)[None, None, :] + column_ON[:, :, None],
                    mask=there_ON[:, :, None] & valid_Q[None, None, :],
                    other=0,
                )
                total_ONQ += value_ON[:, :, None] * read_ONQ.to(tl.float32)
            offset_OQ = (slot_Q * O)[None, :] + o_O[:, None]
            y_OQ = tl.sum(total_ONQ, 1).to(out.dtype.element_ty)
            tl.store(out + offset_OQ, y_OQ, mask=in_O[:, None] & valid_Q[None, :])


def sparse_matvec(
    x_SI: Tensor, expert_S: Tensor, values_EN: Tensor, columns_EN: Tensor, row_starts_EP: Tensor
) -> Tensor:
    """y (S, O) with y_s = Δ_{e(s)} x_s, for few slots; entries are read once per expert where it has few slots."""
    check_floats(x_SI)
    slots, experts, out_features = len(x_SI), len(values_EN), row_starts_EP.shape[1] - 1
    y_SO = x_SI.new_empty(slots, out_features)
    if slots == 0:
        return y_SO
    block = min(_SLOTS, next_power(slots))
    # A little more than an expert's share of the slots, so that few experts read their entries twice.
    together = min(8, next_power(triton.cdiv(slots, experts)))
    per_row = values_EN.shape[1] // out_features
    entries = 128 if per_row > 256 else 64 if per_row > 32 else 32
    _matvec[triton.cdiv(out_features, 8), experts, triton.cdiv(slots, block)](
        x_SI.contiguous(), expert_S.contiguous(), values_EN.contiguous(), columns_EN.contiguous(),
        row_starts_EP.contiguous(), y_SO, slots, x_SI.shape[1], out_features, values_EN.shape[1],
        BLOCK=block, BO=8, BN=entries, BQ=together, num_warps=4,
    )  # fmt: skip
    return y_SO
