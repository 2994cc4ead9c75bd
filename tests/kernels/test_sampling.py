import time

import pytest
import torch

from ders.kernels import largest_positions, sample_positions, stable_hash


def test_stable_hash_is_pinned() -> None:
    assert stable_hash(0, 2, "down_proj") == 7258459853524531078
    assert stable_hash("0") != stable_hash(0)
    assert stable_hash(1, 23) != stable_hash(12, 3)


def test_positions_are_pinned() -> None:
    assert sample_positions(8, 128, 512, seed=7).tolist() == [24478, 25065, 25116, 31415, 37562, 44178, 46360, 59005]
    assert sample_positions(5, 5632, 2048, seed=stable_hash(3, "x")).tolist() == [
        3204682,
        4164651,
        5137484,
        9998331,
        11265516,
    ]


@pytest.mark.parametrize(
    ("out_features", "in_features", "share"), [(7, 11, 0.5), (128, 512, 0.1), (1, 9, 0.4), (33, 1, 1.0)]
)
def test_positions_are_distinct_ascending_and_in_range(out_features: int, in_features: int, share: float) -> None:
    count = round(share * out_features * in_features)
    positions = sample_positions(count, out_features, in_features, seed=5)
    assert len(positions) == count
    assert (positions.diff() > 0).all()
    assert positions.min() >= 0
    assert positions.max() < out_features * in_features


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_positions() -> None:
    assert torch.equal(
        sample_positions(999, 128, 512, seed=7, device="cuda").cpu(), sample_positions(999, 128, 512, seed=7)
    )


def test_positions_are_uniform() -> None:
    # 4,000 draws of 9 among 63: every cell, every row and every pair of neighbours as often as chance says.
    hits = torch.zeros(63)
    pairs = 0
    draws = 4000
    for seed in range(draws):
        positions = sample_positions(9, 7, 9, seed=seed)
        hits[positions] += 1
        pairs += int((positions.diff() == 1).sum())
    expected = draws * 9 / 63
    chi2 = ((hits - expected) ** 2 / (expected * (1 - 9 / 63))).sum()
    assert 25 < chi2 < 115  # 62 degrees of freedom, both tails beyond 1e-5
    expected_pairs = draws * 62 * (9 / 63) * (8 / 62)
    assert abs(pairs - expected_pairs) < 5 * expected_pairs**0.5


def test_fewer_positions_of_a_seed_are_a_subset() -> None:
    few, many = (set(sample_positions(n, 64, 96, seed=1).tolist()) for n in (50, 500))
    assert few < many


def test_cost_follows_the_count_not_the_matrix() -> None:
    started = time.process_time()
    positions = sample_positions(10, 30_000, 60_000, seed=0)  # 1.8 billion entries: a permutation would need 14 GB
    assert len(positions) == 10
    assert time.process_time() - started < 2


def test_too_many_positions() -> None:
    with pytest.raises(ValueError, match="cannot draw 7 distinct positions from a 2×3 matrix"):
        sample_positions(7, 2, 3, seed=0)


def test_matrices_that_indices_cannot_name() -> None:
    with pytest.raises(ValueError, match="more entries than 32-bit indices can name"):
        sample_positions(7, 50_000, 50_000, seed=0)


def test_seeds_are_independent() -> None:
    """Two supports of a tenth share a hundredth, whatever their seeds: neighbours or not."""
    size, count = 128 * 512, 6554
    first = torch.zeros(size, dtype=torch.bool)
    first[sample_positions(count, 128, 512, seed=0)] = True
    expected = count * count / size
    for seed in (1, 2, 3, 2**40):
        shared = int(first[sample_positions(count, 128, 512, seed=seed)].sum())
        assert abs(shared - expected) < 5 * expected**0.5


@pytest.mark.parametrize("count", [1, 10, 63, 64])
def test_largest_positions_are_those_of_a_sort(count: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 8)
    x[2, :] = x[3, :]  # ties
    expected = x.flatten().abs().argsort(descending=True, stable=True)[:count].sort().values
    assert torch.equal(largest_positions(x, count), expected)


def test_largest_positions_of_zeros() -> None:
    assert largest_positions(torch.zeros(3, 4), 5).tolist() == [0, 1, 2, 3, 4]
