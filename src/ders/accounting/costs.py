"""What a generated token costs: bytes of weights read and floating-point operations, counted from a model's shapes.

Only what a token of text meets counts: the decoder and its output embedding, neither a vision tower nor its projector.
Attention scores, the key-value cache, norms' arithmetic and activations' are left out of both; they do not depend on
how experts are stored.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from ders.deltas import Delta, SparseDelta
from ders.moe import MoELayer, SharedBaseMoE, VanillaExperts, moe_layers
from ders.upcycling import find_decoder


def decode_bytes(model: nn.Module, batch: int = 1) -> float:
    """Bytes of weights that one step of decoding reads, per token of the batch, as they are stored.

    A dense matrix, a shared base and a universal FFN are read once for the whole batch; of an embedding one row per
    token; of experts (copies, deltas with their codes, grids and stored positions, biases) the expected number of
    distinct ones that a batch meets when experts are chosen evenly and independently, E (1 − (1 − K/E)^batch). What is
    derived from a seed, such as the columns of a sparse delta, is not stored and not counted.

    Raises:
        ValueError: the batch is empty.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1: got {batch}")
    total = 0.0
    for module in _met(model):
        if isinstance(module, nn.Embedding):
            total += batch * module.embedding_dim * module.weight.element_size()
        elif isinstance(module, MoELayer):
            total += _layer_bytes(module, batch)
        else:
            total += _own_bytes(module)
    return total / batch


def flops_per_token(model: nn.Module) -> int:
    """Floating-point operations of one token in the forward pass: 2 for every multiply-add with a weight.

    The shared base and the universal FFN are met once, whatever K is; full experts, and deltas in their own form
    (kept entries; low-rank factors), K times, extended deltas once more. A quantised delta is widened and multiplied
    whole. A router counts with all its matrices, also those it uses in training only.
    """
    return 2 * sum(
        _layer_multiply_adds(module) if isinstance(module, MoELayer) else _own_multiply_adds(module)
        for module in _met(model)
        if not isinstance(module, nn.Embedding)
    )


def _met(model: nn.Module) -> Iterator[nn.Module]:
    """The modules a text token meets, MoE layers whole, everything else one by one."""
    _, decoder, _ = find_decoder(model)
    inside = {id(inner) for layer in moe_layers(decoder).values() for inner in layer.modules() if inner is not layer}
    yield from (module for module in decoder.modules() if id(module) not in inside)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        yield output


def _own_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))


def _own_multiply_adds(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)


def _all(modules: Iterable[nn.Module | None]) -> Iterator[nn.Module]:
    for module in modules:
        if module is not None:
            yield from module.modules()


def _once(layer: MoELayer) -> list[nn.Module | None]:
    """The parts of a layer that every token meets once."""
    base = [getattr(layer, name) for name in layer.form.projections] if isinstance(layer, SharedBaseMoE) else []
    return [layer.router, layer.universal, *base]


def _layer_bytes(layer: MoELayer, batch: int) -> float:
    count, top_k = layer.router.num_experts, layer.router.top_k
    extra = layer.experts.num_experts - count  # an extended delta, met by every token
    distinct = count * (1 - (1 - top_k / count) ** batch) + extra
    experts = sum(tensor.numel() * tensor.element_size() for tensor in layer.experts.parameters())
    deltas = [module for module in layer.experts.modules() if isinstance(module, Delta)]
    trained = sum(p.numel() * p.element_size() for delta in deltas for p in delta.parameters())
    stored = sum(delta.storage_bits() for delta in deltas) / 8
    return sum(map(_own_bytes, _all(_once(layer)))) + (experts - trained + stored) * distinct / (count + extra)


def _layer_multiply_adds(layer: MoELayer) -> int:
    met = layer.router.top_k + layer.experts.num_experts - layer.router.num_experts
    if isinstance(layer.experts, VanillaExperts):
        one = sum(weight[0].numel() for weight in layer.experts.weights_EOI.values())
    else:
        one = sum(_delta_multiply_adds(module) for module in layer.experts.modules() if isinstance(module, Delta))
    return sum(map(_own_multiply_adds, _all(_once(layer)))) + met * one


def _delta_multiply_adds(delta: Delta) -> int:
    """Of one expert's delta on one slot."""
    if isinstance(delta, SparseDelta):
        return delta.num_kept
    if not delta.storage_bits():
        return 0
    factors = sum(p.numel() for p in delta.parameters()) // delta.num_experts
    return factors or delta.out_features * delta.in_features
