"""Ranks by layer."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

import ders
from ders.deltas.by_layer import ranks_by_layer
from ders.moe import moe_layers


@pytest.mark.parametrize("rank", [2, 4, 7])
@pytest.mark.parametrize("tilt", [-1, -0.3, 0, 0.5, 1])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 12])
def test_the_budget_stays_and_ranks_are_monotonous(rank: int, tilt: float, num_layers: int) -> None:
    ranks = ranks_by_layer(rank, tilt, num_layers)
    assert sum(ranks) == rank * num_layers
    assert min(ranks) >= 1
    assert ranks == sorted(ranks, reverse=tilt < 0)


def test_a_model_has_as_many_parameters_as_with_one_rank(dense_model: Callable[..., Any]) -> None:
    graded, even = dense_model(), dense_model()
    one = ders.upcycle(graded, delta=functools.partial(ders.LowRankByLayerDelta, rank=4, tilt=0.5), layers=[0, 1, 3])
    other = ders.upcycle(even, delta=functools.partial(ders.LowRankDelta, rank=4), layers=[0, 1, 3])
    assert one.added_params == other.added_params
    ranks = [{d.rank for d in layer.experts.deltas.values()} for layer in moe_layers(graded).values()]
    assert ranks == [{3}, {4}, {5}] == [{r} for r in ranks_by_layer(4, 0.5, 3)]


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"rank": 4, "tilt": 1.5}, "tilt must be between -1 and 1: got 1.5"),
        ({"rank": 1, "tilt": 0.5}, "rank must be at least 2"),
        ({"rank": 30, "tilt": 1.0}, "rank must be between 1 and 32"),
    ],
)
def test_dials_out_of_range(dials: dict[str, Any], message: str, dense_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=message):
        ders.upcycle(dense_model(), delta=functools.partial(ders.LowRankByLayerDelta, **dials))
