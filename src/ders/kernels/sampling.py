"""Seeded integers that are the same on every device, in every version, for ever.

`torch.randperm` promises neither its stream nor its cost. Random supports are therefore drawn by a keyed bijection of
the matrix' own index grid: the images of 0, 1, 2, … are distinct by construction, so N positions cost O(N), and only a
seed has to be stored.
"""

import hashlib

import torch
from torch import Tensor

_ROUNDS = 4
_MASK32 = 0xFFFFFFFF


def stable_hash(*parts: int | str) -> int:
    """A 63-bit integer that depends on the parts alone, not on the process, the platform or `PYTHONHASHSEED`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _mix32(x: Tensor) -> Tensor:
    """A bijective finalizer of 32-bit integers held in int64.

    Both multipliers are below 2**31, so no product leaves the signed 64-bit range: nothing relies on overflow.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK32
    return x ^ (x >> 15)


def sample_positions(
    count: int, out_features: int, in_features: int, seed: int, device: torch.device | str | None = None
) -> Tensor:
    """`count` distinct positions of an (O, I) matrix, uniform, ascending: int64 (N,), row-major `row * I + column`.

    A Feistel network over Z_O × Z_I: each half-round adds a keyed hash of one coordinate to the other, modulo that
    other's range. Every half-round is a bijection of the grid, hence so is the whole. A smaller count with the same
    seed draws a subset. Sorting is over the N drawn positions, never over the matrix.
    """
    if not 0 <= count <= out_features * in_features:
        raise ValueError(f"cannot draw {count} distinct positions from a {out_features}×{in_features} matrix")
    index = torch.arange(count, dtype=torch.int64, device=device)
    if count == out_features * in_features:
        return index
    row, column = index // in_features, index % in_features
    for r in range(_ROUNDS):
        column = (column + _mix32(_mix32(row ^ _key(seed, r, 0)) ^ _key(seed, r, 1))) % in_features
        row = (row + _mix32(_mix32(column ^ _key(seed, r, 2)) ^ _key(seed, r, 3))) % out_features
    return (row * in_features + column).sort().values


def _key(seed: int, round_: int, step: int) -> int:
    return stable_hash("position", seed, round_, step) & _MASK32
