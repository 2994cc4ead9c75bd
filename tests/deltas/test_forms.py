import copy
import functools
from typing import Any

import pytest
import torch

from ders.deltas import LowRankDelta, QuantizedDelta, SparseDelta


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


@pytest.mark.parametrize("std", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(QuantizedDelta, bits=8),
        functools.partial(QuantizedDelta, bits=8, symmetric=True),
        functools.partial(SparseDelta, sparsity=0.5, values_bits=8, selection="magnitude"),
    ],
)
def test_small_deltas_survive_every_type(make: Any, std: float) -> None:
    """fp16 has no name for the grids of small deltas, so they are never held or computed in it."""
    torch.manual_seed(0)
    delta = make(2, 24, 64).fit_(torch.randn(2, 24, 64) * std)
    exact = [delta.dense(e) for e in range(2)]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = copy.deepcopy(delta).to(dtype)
        pairs = zip(cast.state_dict().values(), delta.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        x, expert = torch.randn(9, 64).to(dtype), torch.randint(2, (9,))
        expected = torch.einsum("soi,si->so", torch.stack(exact).to(dtype).double()[expert], x.double())
        error = (cast(x, expert).double() - expected).norm() / expected.norm()
        # A product that is itself too small for fp16 is not the delta's fault.
        assert error < 4 * torch.finfo(dtype).eps + 1e-6 or (dtype == torch.float16 and std < 1e-5)


def test_gradients_in_half_precision_do_not_drift_with_the_rows() -> None:
    torch.manual_seed(0)
    delta = QuantizedDelta(1, 4096, 64, bits=4).fit_(torch.randn(1, 4096, 64))
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(5, 4096, dtype=torch.bfloat16)
    delta(x, torch.zeros(5, dtype=torch.int64)).backward(upstream)
    assert x.grad is not None
    exact = upstream.double() @ delta.dense(0).double()
    assert (x.grad.double() - exact).norm() / exact.norm() < 5e-3
