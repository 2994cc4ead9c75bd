"""Seeded integers that are the same on every device, in every version, for ever.

`torch.randperm` promises neither its stream nor its cost. Random supports are therefore drawn by a keyed bijection of
the integers below a power of two: the images of 0, 1, 2, … are distinct by construction, so N positions cost O(N), and
only a seed has to be stored.
"""

import hashlib

import torch
from torch import Tensor

_ROUNDS = 4
# Small enough for a block of 64-bit integers to stay in a core's cache.
_BLOCK = 1 << 16


def stable_hash(*parts: int | str) -> int:
    """A 63-bit integer that depends on the parts alone, not on the process, the platform or `PYTHONHASHSEED`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def sample_positions(
    count: int, out_features: int, in_features: int, seed: int, device: torch.device | str | None = None
) -> Tensor:
    """`count` distinct positions of an (O, I) matrix, uniform, ascending: int64 (N,), row-major `row * I + column`.

    Of the smallest power of two that holds the matrix, 2**k, a keyed bijection permutes the integers: four rounds of
    x ← (x + a)·m mod 2**k with odd m, then x ← x ^ (x >> ⌈k/2⌉). Images outside the matrix are passed over, fewer
    than half. A smaller count with the same seed draws a subset. Sorting is over the N drawn positions, never over
    the matrix.

    Raises:
        ValueError: more positions than the matrix has, or a matrix of 2**31 entries or more.
    """
    size = out_features * in_features
    if not 0 <= count <= size:
        raise ValueError(f"cannot draw {count} distinct positions from a {out_features}×{in_features} matrix")
    if size >= 2**31:
        raise ValueError(f"a {out_features}×{in_features} matrix has more entries than 32-bit indices can name")
    if count == size:
        return torch.arange(size, dtype=torch.int64, device=device)
    bits = max(2, (size - 1).bit_length())
    mask, shift = (1 << bits) - 1, (bits + 1) // 2
    keys = [(_key(seed, r, 0) & mask, _key(seed, r, 1) & mask | 1) for r in range(_ROUNDS)]
    drawn, missing, start = [torch.empty(0, dtype=torch.int32, device=device)], count, 0
    while missing > 0:
        # Factors stay below 2**31 and 2**32: no product leaves the signed 64-bit range, nothing relies on overflow.
        x = torch.arange(start, min(start + _BLOCK, 1 << bits), dtype=torch.int64, device=device)
        for addend, factor in keys:
            x.add_(addend).mul_(factor).bitwise_and_(mask)
            x.bitwise_xor_(x >> shift)
        inside = x.int()
        inside = inside[inside < size]
        drawn.append(inside[:missing])
        missing -= len(drawn[-1])
        start += _BLOCK
    return torch.cat(drawn).sort().values.long()


def largest_positions(x: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest magnitudes of a tensor, ascending: int64 (N,); of equals, the first ones.

    A histogram over the leading bits of the magnitudes finds the one bin in which the threshold lies, so only that bin
    is ever sorted.
    """
    # The bits of non-negative floats order as the floats do.
    magnitude = x.detach().flatten().to(torch.float32).abs().view(torch.int32)
    above_B = torch.bincount(magnitude >> 16, minlength=1 << 15).flip(0).cumsum(0).flip(0)
    bin_ = int((above_B >= count).nonzero()[-1])
    chosen = (magnitude >> 16) > bin_
    candidates = ((magnitude >> 16) == bin_).nonzero().flatten()
    order = magnitude[candidates].argsort(descending=True, stable=True)
    chosen[candidates[order[: count - int(chosen.sum())]]] = True
    return chosen.nonzero().flatten()


def _key(seed: int, round_: int, step: int) -> int:
    return stable_hash("position", seed, round_, step)
