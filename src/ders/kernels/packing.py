"""Small integers packed into bytes, and sorted positions packed into little more than information theory asks.

N packed numbers, B bytes; leading dimensions are kept.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes of 1, 2, 3, 4 or 8 bits: eight 3-bit codes share three bytes, all others fill one."""
    per_group, group = _group(bits)
    return math.ceil(count / per_group) * group


def pack(codes_N: Tensor, bits: int) -> Tensor:
    """uint8 (…, N) below 2**bits → uint8 (…, B); the first code lies in the lowest bits (little-endian)."""
    per_group, group = _group(bits)
    if bits == 8:
        return codes_N
    if missing := -codes_N.shape[-1] % per_group:
        codes_N = F.pad(codes_N, (0, missing))
    codes_N = codes_N.contiguous()
    if group == 1:
        # Read the bytes that share one as one integer, then fold its halves together until the bits lie side by side.
        word = codes_N.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[per_group])
        for doubling in range(per_group.bit_length() - 1):
            word = word | (word >> ((8 - bits) << doubling))
        return word.to(torch.uint8)  # keeps the lowest byte
    wide = codes_N.unflatten(-1, (-1, per_group)).to(torch.int32)
    word = sum((wide[..., j] << (bits * j) for j in range(per_group)), torch.zeros_like(wide[..., 0]))
    return torch.stack([(word >> (8 * i)).to(torch.uint8) for i in range(group)], dim=-1).flatten(-2)


def unpack(bytes_B: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 (…, B) → uint8 (…, count)."""
    per_group, group = _group(bits)
    if bits == 8:
        return bytes_B
    if group == 1:
        parts = [bytes_B >> (bits * j) for j in range(per_group)]
    else:
        wide = bytes_B.unflatten(-1, (-1, group)).to(torch.int32)
        word = sum((wide[..., i] << (8 * i) for i in range(group)), torch.zeros_like(wide[..., 0]))
        parts = [(word >> (bits * j)).to(torch.uint8) for j in range(per_group)]
    codes = torch.stack(parts, dim=-1).flatten(-2)
    return codes.bitwise_and_((1 << bits) - 1)[..., :count]


def _group(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest whole number of bytes that whole codes fill."""
    if bits not in (1, 2, 3, 4, 8):
        raise ValueError(f"bits must be 1, 2, 3, 4 or 8: got {bits}")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def positions_size(count: int, size: int) -> int:
    """Bytes `pack_positions` needs for `count` positions below `size`."""
    return min(math.ceil(size / 8), _delta_coded_size(count, size))


def pack_positions(positions_N: Tensor, size: int) -> Tensor:
    """Ascending positions (N,) below `size` → uint8 (B,), as a bitmap or delta-coded, whichever is smaller.

    The delta code is Elias–Fano's (Elias 1974): of each position the ⌊log2(size / N)⌋ low bits as they are, plane by
    plane, and the rest as gaps in unary. Its length follows from N and `size` alone, and is at most half a bit per
    position above the least possible.
    """
    count = len(positions_N)
    if not _delta_coded(count, size):
        return pack(_marks(positions_N, size), 1)
    low_bits = _low_bits(count, size)
    planes = [pack((positions_N >> j).to(torch.uint8) & 1, 1) for j in range(low_bits)]
    order = torch.arange(count, device=positions_N.device)
    return torch.cat([*planes, pack(_marks((positions_N >> low_bits) + order, _unary_size(count, size)), 1)])


def unpack_positions(bytes_B: Tensor, count: int, size: int) -> Tensor:
    """The inverse of `pack_positions`: int64 (N,).

    Raises:
        ValueError: the bytes do not hold `count` positions.
    """
    if not _delta_coded(count, size):
        positions_N = unpack(bytes_B, 1, size).nonzero().flatten()
    else:
        low_bits, plane = _low_bits(count, size), packed_size(count, 1)
        high = unpack(bytes_B[low_bits * plane :], 1, _unary_size(count, size)).nonzero().flatten()
        positions_N = (high - torch.arange(len(high), device=high.device)) << low_bits
        for j in range(low_bits if len(high) == count else 0):
            positions_N |= unpack(bytes_B[j * plane : (j + 1) * plane], 1, count).long() << j
    if len(positions_N) != count:
        raise ValueError(f"a packed support names {len(positions_N)} positions instead of {count}: it is damaged")
    return positions_N


def _marks(positions_N: Tensor, size: int) -> Tensor:
    marks = torch.zeros(size, dtype=torch.uint8, device=positions_N.device)
    marks[positions_N] = 1
    return marks


def _low_bits(count: int, size: int) -> int:
    return max(size // count, 1).bit_length() - 1


def _unary_size(count: int, size: int) -> int:
    return count + (size >> _low_bits(count, size)) + 1


def _delta_coded_size(count: int, size: int) -> int:
    return _low_bits(count, size) * packed_size(count, 1) + packed_size(_unary_size(count, size), 1)


def _delta_coded(count: int, size: int) -> bool:
    return _delta_coded_size(count, size) < math.ceil(size / 8)
