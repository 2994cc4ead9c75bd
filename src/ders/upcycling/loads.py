"""How much of a delta budget an expert gets, by the tokens that it serves.

E experts, K top-k, T tokens.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ders.deltas import LowRankByLoadDelta
from ders.moe import MoELayer, Routing, SharedBaseMoE, moe_layers, take_routings


def allot_by_load(model: nn.Module, run: Callable[[Any], Any], samples: Iterable[Any]) -> dict[str, Tensor]:
    """Give the experts of every `LowRankByLoadDelta` ranks in proportion to the tokens that they serve.

    Args:
        model: upcycled, not trained yet.
        run: runs the model on one sample, without padding; what it returns is dropped.
        samples: one at a time.

    Returns:
        How many tokens each expert served (E,), by the layer's name.

    Raises:
        ValueError: the model has no such delta, is trained, or there is no sample.
    """
    allotted = {name: layer for name, layer in moe_layers(model).items() if _deltas(layer)}
    if not allotted:
        raise ValueError("this model has no deltas whose ranks go by load: upcycle with LowRankByLoadDelta")
    loads: dict[str, Tensor] = {}
    take_routings(model)
    for sample in samples:
        with torch.no_grad():
            run(sample)
        for name, routing in take_routings(model).items():
            if name in allotted:
                loads[name] = loads.get(name, 0) + _load(routing, allotted[name].experts.num_experts)
    if not loads:
        raise ValueError("ranks are allotted by the routing of some samples: there is none")
    for name, loads_E in loads.items():
        for delta in _deltas(allotted[name]):
            delta.allot_(loads_E)
    return loads


def _deltas(layer: MoELayer) -> list[LowRankByLoadDelta]:
    deltas = layer.experts.deltas.values() if isinstance(layer, SharedBaseMoE) else ()
    return [delta for delta in deltas if isinstance(delta, LowRankByLoadDelta)]


def _load(routing: Routing, num_experts: int) -> Tensor:
    kept_TK = routing.top_k_weights_TK > 0
    counts_E = routing.top_k_index_TK[kept_TK].bincount(minlength=num_experts)
    # A universal FFN over the shared base is one expert more, which serves every token.
    counts_E[routing.probs_TE.shape[1] :] = len(routing.probs_TE)
    return counts_E
