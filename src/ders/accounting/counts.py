"""Parameter counts as records and tables print them."""

from dataclasses import dataclass

from torch import nn

from ders.deltas import Delta
from ders.moe import moe_layers


@dataclass(frozen=True)
class Counts:
    """Parameter counts of a model; weights stored as k-bit codes count k/16 each, as in the paper's tables.

    Attributes:
        total_params: everything.
        added_params: everything over the dense model it came from, universal FFNs included.
        added_params_universal: the universal FFNs' part of that.
        added_params_paper: added parameters as the paper's tables count them, universal FFNs apart: deltas or copies,
            routers and the biases of all experts but one; never indices. Its compression tables leave routers and
            biases out, which are counted here all the same.
        active_params: what one token meets: top_k of the experts.
        trainable_params: what receives gradients now.
    """

    total_params: int
    added_params: int
    added_params_universal: int
    added_params_paper: int
    active_params: int
    trainable_params: int


def _size(module: nn.Module | None) -> int:
    if module is None:
        return 0
    coded = sum(delta.coded_params() for delta in module.modules() if isinstance(delta, Delta))
    return coded + sum(p.numel() for p in module.parameters())


def count_parameters(model: nn.Module) -> Counts:
    """Count a model, dense or upcycled. Tied parameters count once."""
    layers = moe_layers(model).values()
    total = _size(model)
    added = sum(_size(layer) - layer.num_dense_params for layer in layers)
    universal = sum(_size(layer.universal) for layer in layers)
    idle = sum(
        _size(layer.experts) * (layer.router.num_experts - layer.router.top_k) // layer.experts.num_experts
        for layer in layers
    )
    return Counts(
        total_params=total,
        added_params=added,
        added_params_universal=universal,
        added_params_paper=added - universal,
        active_params=total - idle,
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
