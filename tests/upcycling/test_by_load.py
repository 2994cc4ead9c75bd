"""Ranks by the tokens that experts serve."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ders
from ders.deltas import LowRankByLoadDelta
from ders.moe import moe_layers
from ders.upcycling.loads import allot_by_load

SAMPLES = torch.randint(3, 60, (5, 1, 13), generator=torch.Generator().manual_seed(0))
BY_LOAD = functools.partial(LowRankByLoadDelta, rank=3)


@pytest.mark.parametrize(
    ("loads", "ranks"),
    [([1, 1, 1, 1], [3, 3, 3, 3]), ([5, 1, 0, 2], [6, 2, 1, 3]), ([0, 0, 7, 0], [1, 1, 9, 1])],
)
def test_the_budget_stays_and_follows_the_load(loads: list[int], ranks: list[int]) -> None:
    delta = BY_LOAD(4, 20, 30)
    delta.allot_(torch.tensor(loads))
    assert delta.ranks_E.tolist() == ranks
    torch.nn.init.normal_(delta.b_OR)
    assert [int(torch.linalg.matrix_rank(delta.dense(expert))) for expert in range(4)] == ranks


def test_uneven_ranks_are_applied_and_fitted() -> None:
    dtype = torch.float64
    delta = BY_LOAD(3, 11, 14).to(dtype)
    delta.allot_(torch.tensor([5, 1, 0]))
    torch.nn.init.normal_(delta.b_OR)
    x, expert = torch.randn(9, 14, dtype=dtype, requires_grad=True), torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 0])
    dense = torch.stack([delta.dense(e) for e in range(3)])
    upstream = torch.randn(9, 11, dtype=dtype)
    leaves = [x, delta.a_RI, delta.b_OR]
    ways = (delta(x, expert), torch.einsum("soi,si->so", dense[expert], x))
    torch.testing.assert_close(*ways)
    torch.testing.assert_close(*[torch.autograd.grad(y, leaves, upstream, retain_graph=True) for y in ways])
    fitted = BY_LOAD(3, 11, 14, seed=1).to(dtype)
    fitted.allot_(torch.tensor([5, 1, 0]))
    fitted.fit_(dense.detach())
    torch.testing.assert_close(torch.stack([fitted.dense(e) for e in range(3)]), dense)


@pytest.mark.parametrize("extended", [False, True])
def test_loads_are_those_of_the_samples(extended: bool, dense_model: Callable[..., Any], tmp_path: Path) -> None:
    model = dense_model()
    options = {"universal": True, "extended": True, "universal_weight": "one"} if extended else {}
    ders.upcycle(model, delta=BY_LOAD, top_k=1, seed=3, **options)
    params = model.num_parameters()
    loads = allot_by_load(model, lambda ids: model(input_ids=ids), SAMPLES)
    assert model.num_parameters() == params
    for name, layer in moe_layers(model).items():
        assert loads[name][:4].sum() == 5 * 13
        assert loads[name][4:].tolist() == [5 * 13] * extended
        assert layer.last_routing is None
        for delta in layer.experts.deltas.values():
            order = delta.ranks_E[loads[name].argsort(stable=True)].tolist()
            assert order == sorted(order)
            assert sum(order) == 3 * len(loads[name])
            assert len(set(order)) > 1
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_ids=SAMPLES[0]).logits, model(input_ids=SAMPLES[0]).logits)


def test_what_cannot_be_allotted(dense_model: Callable[..., Any]) -> None:
    plain, model = dense_model(), dense_model()
    ders.upcycle(plain, delta=functools.partial(ders.LowRankDelta, rank=2))
    with pytest.raises(ValueError, match="no deltas whose ranks go by load"):
        allot_by_load(plain, lambda ids: plain(input_ids=ids), SAMPLES)
    ders.upcycle(model, delta=BY_LOAD)
    with pytest.raises(ValueError, match="some samples: there is none"):
        allot_by_load(model, lambda ids: model(input_ids=ids), [])
    delta = next(iter(next(iter(moe_layers(model).values())).experts.deltas.values()))
    with pytest.raises(ValueError, match="the tokens that experts serve: there is none"):
        delta.allot_(torch.zeros(4))
    torch.nn.init.ones_(delta.b_OR)
    with pytest.raises(ValueError, match="before training"):
        allot_by_load(model, lambda ids: model(input_ids=ids), SAMPLES)


@pytest.mark.parametrize(
    ("rank", "message"),
    [(1, "rank must be at least 2"), (9, "could give one of 4 experts more than 32, .*: set rank to 8 or less")],
)
def test_dials_out_of_range(rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankByLoadDelta(4, 32, 48, rank=rank)
