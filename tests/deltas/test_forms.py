import pytest
import torch

from ders.deltas import LowRankDelta, SparseDelta


@pytest.mark.parametrize("sparsity", [1.0, 1.2, -0.1])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        SparseDelta(2, 8, 8, sparsity=sparsity)


def test_sparsity_that_keeps_nothing_names_a_workable_value() -> None:
    with pytest.raises(ValueError, match=r"keeps none of the 64 entries.*set sparsity to 0.984 or less"):
        SparseDelta(2, 8, 8, sparsity=0.9999)
    with torch.device("meta"), pytest.raises(ValueError, match=r"set sparsity to 0\.999999913 or less"):
        SparseDelta(2, 5632, 2048, sparsity=0.99999999)
    assert SparseDelta(2, 8, 8, sparsity=0.984).num_kept == 1
    assert SparseDelta(2, 5632, 2048, sparsity=0.999999913).num_kept == 1


@pytest.mark.parametrize(("sparsity", "kept"), [(0.9999, 7), (0.999, 66), (0.5, 32768), (0.0, 65536)])
def test_kept_entries_are_the_rounded_share(sparsity: float, kept: int) -> None:
    delta = SparseDelta(2, 512, 128, sparsity=sparsity)
    assert delta.values_EN.shape == (2, kept)
    torch.nn.init.ones_(delta.values_EN)
    assert int(delta.dense(0).sum()) == kept


def test_indices_cost_nothing_and_seeds_eight_bytes() -> None:
    delta = SparseDelta(4, 512, 128, sparsity=0.999)
    assert delta.storage_bits() == 4 * 66 * 32 + 4 * 64


def test_sparse_fit_keeps_the_entries_at_its_positions() -> None:
    target = torch.randn(2, 8, 8)
    delta = SparseDelta(2, 8, 8, sparsity=0.75).fit_(target)
    kept = delta.dense(1) != 0
    assert int(kept.sum()) == 16
    assert torch.equal(delta.dense(1)[kept], target[1][kept])


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ValueError, match="rank must be between 1 and 8"):
        LowRankDelta(2, 8, 12, rank=rank)


def test_low_rank_fit_is_the_best_of_its_rank() -> None:
    torch.manual_seed(0)
    target = torch.randn(1, 9, 7, dtype=torch.float64)
    error = (LowRankDelta(1, 9, 7, rank=3).double().fit_(target).dense(0) - target[0]).square().sum()
    discarded = torch.linalg.svdvals(target[0])[3:].square().sum()
    torch.testing.assert_close(error, discarded)
