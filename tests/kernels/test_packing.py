import math

import pytest
import torch

from ders.kernels import pack, pack_positions, packed_size, positions_size, unpack, unpack_positions


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 37, 64])
def test_codes_come_back(bits: int, count: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(2**bits, (3, count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, packed_size(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)


def test_layout_is_pinned() -> None:
    """Files hold these bytes: the first code lies in the lowest bits."""
    assert pack(torch.tensor([1, 2, 3, 0, 3], dtype=torch.uint8), 2).tolist() == [0b00_11_10_01, 0b11]
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8), 1).tolist() == [0b1000_0001, 1]
    assert pack(torch.tensor([5, 12, 7], dtype=torch.uint8), 4).tolist() == [0xC5, 7]
    three = pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3).tolist()
    assert int.from_bytes(bytes(three), "little") == sum(
        code << (3 * i) for i, code in enumerate([1, 2, 3, 4, 5, 6, 7])
    )


@pytest.mark.parametrize(("bits", "count", "size"), [(1, 9, 2), (2, 5, 2), (3, 8, 3), (3, 9, 6), (4, 3, 2), (8, 3, 3)])
def test_sizes(bits: int, count: int, size: int) -> None:
    assert packed_size(count, bits) == size


def test_unknown_bits() -> None:
    with pytest.raises(ValueError, match="bits must be 1, 2, 3, 4 or 8: got 5"):
        packed_size(3, 5)


@pytest.mark.parametrize(
    ("count", "size"), [(1, 1), (1, 100), (50, 100), (10, 100), (99, 100), (100, 100), (3, 65536), (6554, 65536)]
)
def test_positions_come_back(count: int, size: int) -> None:
    positions = torch.randperm(size, generator=torch.Generator().manual_seed(1))[:count].sort().values
    packed = pack_positions(positions, size)
    assert len(packed) == positions_size(count, size) <= math.ceil(size / 8)
    assert torch.equal(unpack_positions(packed, count, size), positions)


@pytest.mark.parametrize("positions", [[0, 1, 2], [97, 98, 99], [0, 50, 99]])
def test_clustered_positions(positions: list[int]) -> None:
    packed = pack_positions(torch.tensor(positions), 100)
    assert unpack_positions(packed, 3, 100).tolist() == positions


def test_delta_coding_is_close_to_the_least_possible() -> None:
    count, size = 6554, 65536
    entropy = size * -sum(p * math.log2(p) for p in (0.1, 0.9))
    assert positions_size(count, size) * 8 < entropy + 0.65 * count
    assert positions_size(size // 2, size) == size // 8  # a bitmap where half is kept


def test_damaged_positions_are_told() -> None:
    packed = pack_positions(torch.arange(0, 100, 10), 100)
    packed[-1] ^= 0b1
    with pytest.raises(ValueError, match="instead of 10: it is damaged"):
        unpack_positions(packed, 10, 100)
