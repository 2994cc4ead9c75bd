"""Sparse deltas whose positions are chosen or move."""

import pytest
import torch

from ders.deltas import RegrownSparseDelta, ScoredSparseDelta
from ders.deltas.regrown import rearranged


def test_the_best_are_dealt_out_like_cards() -> None:
    torch.manual_seed(0)
    delta = ScoredSparseDelta(3, 7, 9, sparsity=0.8)
    scores = torch.randn(7, 9)
    delta.choose_(scores)
    ranked = scores.abs().flatten().tolist()
    order = sorted(range(63), key=lambda position: -ranked[position])
    assert delta.num_kept == 13
    for expert in range(3):
        assert delta.positions(expert).tolist() == sorted(order[expert : 3 * 13 : 3])


def test_ties_give_each_expert_its_own_too() -> None:
    delta = ScoredSparseDelta(4, 6, 6, sparsity=0.75)
    delta.choose_(torch.zeros(6, 6))
    assert sorted(p for e in range(4) for p in delta.positions(e).tolist()) == list(range(36))


def test_shares_that_cannot_be_disjoint_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsity must be at least 0.75 for 4 experts .*: got 0.7"):
        ScoredSparseDelta(4, 10, 10, sparsity=0.7)
    with pytest.raises(ValueError, match="fraction of zeros: got 1"):
        ScoredSparseDelta(4, 10, 10, sparsity=1)


def test_choosing_again_moves_what_was_derived() -> None:
    torch.manual_seed(0)
    delta = ScoredSparseDelta(2, 5, 7, sparsity=0.8).double()
    torch.nn.init.normal_(delta.values_EN)
    x, expert = torch.randn(4, 7, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    for seed in range(2):
        delta.choose_(torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)))
        slow = torch.einsum("soi,si->so", torch.stack([delta.dense(e) for e in range(2)])[expert], x)
        torch.testing.assert_close(delta(x, expert), slow)


def regrowing(seed: int = 0) -> RegrownSparseDelta:
    torch.manual_seed(seed)
    delta = RegrownSparseDelta(2, 7, 9, sparsity=0.8, seed=seed)
    torch.nn.init.normal_(delta.values_EN)
    return delta


@pytest.mark.parametrize("count", [1, 4, 13])
def test_the_smallest_go_and_the_steepest_come(count: int) -> None:
    delta, scores = regrowing(), torch.randn(7, 9)
    before, others = delta.dense(1).flatten().tolist(), delta.dense(0)
    delta.rearrange_(1, *delta.regrown(1, count, scores))
    held = sorted((p for p in range(63) if before[p]), key=lambda p: abs(before[p]))
    kept = set(held[count:])
    steep = sorted((p for p in range(63) if p not in kept), key=lambda p: -abs(scores.flatten()[p].item()))
    assert delta.positions(1).tolist() == sorted(kept | set(steep[:count]))
    assert delta.dense(1).flatten().tolist() == [before[p] if p in kept else 0 for p in range(63)]
    assert torch.equal(delta.dense(0), others)
    x, expert = torch.randn(3, 9), torch.tensor([1, 0, 1])
    slow = torch.einsum("soi,si->so", torch.stack([delta.dense(e) for e in range(2)])[expert], x)
    torch.testing.assert_close(delta(x, expert), slow)


def test_where_nothing_says_where_nothing_moves() -> None:
    delta, before = regrowing(), regrowing()
    for count, scores in ((3, torch.zeros(7, 9)), (0, torch.randn(7, 9))):
        delta.rearrange_(0, *delta.regrown(0, count, scores))
    assert torch.equal(delta.dense(0), before.dense(0))


def test_what_belongs_to_values_goes_with_them() -> None:
    moments = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rearranged(moments, torch.tensor([3, -1, 0, -1])).tolist() == [4, 0, 1, 0]


def test_born_at_random_positions_of_its_seed() -> None:
    one, same, other = (RegrownSparseDelta(2, 20, 20, sparsity=0.9, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.positions(0), same.positions(0))
    assert not torch.equal(one.positions(0), other.positions(0))
    assert not torch.equal(one.positions(0), one.positions(1))
