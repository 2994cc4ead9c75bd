"""Models that an adapter is saved from, for all tests of adapters."""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

import ders
from ders.compression import compress
from ders.moe import moe_layers

DELTAS: dict[str, Any] = {
    "ders_sm": functools.partial(ders.SparseDelta, sparsity=0.9),
    "ders_lm": functools.partial(ders.LowRankDelta, rank=2),
    "ders_neuron": functools.partial(ders.NeuronDelta, neurons=3),
    "quantize": functools.partial(ders.QuantizedDelta, bits=2),
}
IDS = torch.tensor([[1, 5, 9, 30, 2, 17]])


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS})).logits


def tokens(model: Any) -> Tensor:
    return model.generate(IDS, max_new_tokens=6, do_sample=False)


def trained(dense: Any, method: str = "ders_sm", trainable: str = "adapter", seed: int = 0, **options: Any) -> Any:
    """A copy of a dense model, upcycled (and compressed), then trained for two steps."""
    model = copy.deepcopy(dense)
    torch.manual_seed(seed)
    if method == "quantize":
        ders.upcycle(model, seed=seed, **options)
        for layer in moe_layers(model).values():
            for weight in layer.experts.weights_EOI.values():
                weight.data += 0.002 * torch.randn_like(weight)
        compress(model, dense, delta=DELTAS[method])
    else:
        ders.upcycle(model, delta=DELTAS[method], seed=seed, **options)
    ders.set_trainable(model, trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        ids = torch.randint(5, 13, (2, 8))
        head = model.lm_head(model.get_decoder()(input_ids=ids).last_hidden_state)
        nn.functional.cross_entropy(head.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
