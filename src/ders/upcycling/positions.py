"""Where sparse deltas should lie, by what the loss says.

S slots (a token and one of its choices), O/I out/in features.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ders.deltas import RegrownSparseDelta, ScoredSparseDelta
from ders.moe import SharedBaseMoE, moe_layers


def choose_by_fisher(model: nn.Module, loss_of: Callable[[Any], Tensor], samples: Iterable[Any]) -> int:
    """Give every `ScoredSparseDelta` the entries to which the loss is most sensitive; returns how many there are.

    An entry's score is the sum over the samples of (∂loss/∂W)², the diagonal of the empirical Fisher information (FISH
    mask, arXiv 2111.09839), W the shared base: it is what every expert is at birth. Scores take as much memory as the
    bases, in fp32, besides a gradient of them.

    Args:
        model: upcycled, not trained yet.
        loss_of: the loss of one sample.
        samples: one at a time: the square of a batch's gradient would be another quantity.

    Raises:
        ValueError: the model has no such delta, or there is no sample.
    """
    chosen = [
        (delta, getattr(layer, name).weight)
        for layer in moe_layers(model).values()
        if isinstance(layer, SharedBaseMoE)
        for name, delta in layer.experts.deltas.items()
        if isinstance(delta, ScoredSparseDelta)
    ]
    if not chosen:
        raise ValueError("this model has no deltas whose positions are chosen by a score: upcycle with one")
    weights = [weight for _, weight in chosen]
    trained = [weight.requires_grad for weight in weights]
    scores = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    count = 0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for sample in samples:
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss_of(sample), weights)
            for score, gradient in zip(scores, gradients, strict=True):
                score += gradient.to(score.dtype).square()
            count += 1
    finally:
        for weight, before in zip(weights, trained, strict=True):
            weight.requires_grad_(before)
    if count == 0:
        raise ValueError("positions are chosen by the loss of some samples: there is none")
    for (delta, _), score in zip(chosen, scores, strict=True):
        delta.choose_(score)
    return len(chosen)


def regrown_deltas(model: nn.Module) -> list[RegrownSparseDelta]:
    """The deltas of a model whose positions move, in order."""
    return [module for module in model.modules() if isinstance(module, RegrownSparseDelta)]


def expert_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> Iterator[tuple[RegrownSparseDelta, int, Tensor]]:
    """The gradient (O, I) of each expert's full weight W_base + Δ_e, one matrix at a time, in the deltas' order.

    One forward and backward pass in which deltas are applied slot by slot, all slots' inputs and gradients kept; then
    each matrix costs what the weight gradient of a vanilla expert costs. No more than one is held at a time.
    """
    watched = regrown_deltas(model)
    calls: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    try:
        for delta in watched:
            delta.watching = calls[id(delta)] = []
        with torch.enable_grad():
            value = loss()
        # Activation checkpointing would call the deltas again in the backward pass.
        first = [(delta, *call) for delta in watched for call in list(calls[id(delta)])]
        gradients = torch.autograd.grad(value, [y_SO for *_, y_SO in first])
    finally:
        for delta in watched:
            delta.watching = None
    for (delta, x_SI, expert_S, _), gradient_SO in zip(first, gradients, strict=True):
        wide = torch.promote_types(gradient_SO.dtype, torch.float32)
        for expert in range(delta.num_experts):
            mine = expert_S == expert
            yield delta, expert, (gradient_SO[mine].T.to(wide) @ x_SI[mine].to(wide)).detach()
