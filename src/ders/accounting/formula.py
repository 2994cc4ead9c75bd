"""The paper's rule for added parameters, from a few numbers of an architecture (arXiv 2503.01359, Tables 1–4, S7–S18).

The paper states no formula; this one gives every number it prints but a few misprints. With E experts over L layers, F
the weights of one FFN times L, b its biases times L and R all routers:

    vanilla   (E − 1)(F + b) + R
    ders_sm   E F (1 − sparsity) + (E − 1) b + R
    ders_lm   E L rank Σ (out + in) + (E − 1) b + R, the sum over the matrices of one FFN
    sparsify  E F (1 − sparsity)                            neither routers nor biases
    quantize  E F bits / 16                                 nor scales and zero points

A universal FFN is another F + b, counted apart. Extended, it is one more delta over the same base: E + 1 deltas and E
sets of biases. Indices are never counted. What a sparse delta keeps is rounded matrix by matrix, as `SparseDelta` does.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ders.moe import MoELayer, VanillaMoE, moe_layers


@dataclass(frozen=True)
class Architecture:
    """What the rule needs to know of an upcycled model.

    Attributes:
        matrices: (out, in) of every matrix of one FFN.
        biases: entries of all biases of one FFN.
        num_layers: L, those with experts.
        num_experts: E.
        router_params: of one layer.
        universal: whether a universal FFN serves every token.
    """

    matrices: tuple[tuple[int, int], ...]
    biases: int
    num_layers: int
    num_experts: int
    router_params: int
    universal: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> "Architecture":
        """Read off a model that was upcycled by any method, on any device.

        Raises:
            ValueError: it has no MoE layers, or layers of different shapes.
        """
        found = {_of_layer(layer) for layer in moe_layers(model).values()}
        if len(found) != 1:
            raise ValueError(f"the rule wants MoE layers of one shape: this model has {len(found) or 'no MoE layers'}")
        return cls(num_layers=len(moe_layers(model)), **dict(found.pop()))

    @property
    def ffn_params(self) -> int:
        """F: the weights of one FFN in every MoE layer."""
        return self.num_layers * sum(rows * columns for rows, columns in self.matrices)

    @property
    def bias_params(self) -> int:
        """b: the biases of one FFN in every MoE layer."""
        return self.num_layers * self.biases

    @property
    def routing_params(self) -> int:
        """R: all routers."""
        return self.num_layers * self.router_params


def _of_layer(layer: MoELayer) -> tuple[tuple[str, Any], ...]:
    if isinstance(layer, VanillaMoE):
        matrices = [tuple(weight.shape[1:]) for weight in layer.experts.weights_EOI.values()]
    else:
        matrices = [tuple(weight.shape) for weight in layer.shared_parameters()]
    return (
        ("matrices", tuple(matrices)),
        ("biases", sum(bias.shape[1] for bias in layer.experts.biases_EO.values())),
        ("num_experts", layer.router.num_experts),
        ("router_params", sum(parameter.numel() for parameter in layer.router.parameters())),
        ("universal", layer.has_universal),
    )


@dataclass(frozen=True)
class Added:
    """Parameters over the dense model.

    Attributes:
        experts: without the universal FFNs; with them where those are deltas too.
        universal: of the universal FFNs, where they are apart; else 0.
    """

    experts: int
    universal: int = 0

    @property
    def total(self) -> int:
        return self.experts + self.universal


def vanilla(a: Architecture) -> Added:
    """E full copies of the FFN, one of which was there before."""
    return Added((a.num_experts - 1) * (a.ffn_params + a.bias_params) + a.routing_params, _universal(a))


def ders_sm(a: Architecture, sparsity: float, *, extended: bool = False) -> Added:
    """A shared base and sparse deltas, trained."""
    return _trained(a, _kept(a, sparsity), extended)


def ders_lm(a: Architecture, rank: int, *, extended: bool = False) -> Added:
    """A shared base and deltas of low rank, trained."""
    return _trained(a, sum(rank * (rows + columns) for rows, columns in a.matrices), extended)


def sparsify(a: Architecture, sparsity: float, *, extended: bool = False) -> Added:
    """Trained experts over their base, sparsified."""
    return _compressed(a, _deltas(a, extended) * _kept(a, sparsity), extended)


def quantize(a: Architecture, bits: int, *, extended: bool = False) -> Added:
    """Trained experts over their base, as codes that count bits/16 of a parameter each."""
    coded = sum(_deltas(a, extended) * rows * columns * bits // 16 for rows, columns in a.matrices)
    return _compressed(a, coded, extended)


def _kept(a: Architecture, sparsity: float) -> int:
    return sum(round((1 - sparsity) * rows * columns) for rows, columns in a.matrices)


def _deltas(a: Architecture, extended: bool) -> int:
    if extended and not a.universal:
        raise ValueError("extended counts the universal FFN as one more delta, and this architecture has none")
    return a.num_experts + extended


def _universal(a: Architecture) -> int:
    return a.ffn_params + a.bias_params if a.universal else 0


def _trained(a: Architecture, per_delta: int, extended: bool) -> Added:
    deltas = _deltas(a, extended)
    experts = a.num_layers * deltas * per_delta + (deltas - 1) * a.bias_params + a.routing_params
    return Added(experts, 0 if extended else _universal(a))


def _compressed(a: Architecture, per_layer: int, extended: bool) -> Added:
    return Added(a.num_layers * per_layer, 0 if extended else _universal(a))
