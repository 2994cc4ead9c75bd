"""The step-0 certificate: a freshly upcycled model computes what its dense parent computes."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ders.moe import MoELayer, moe_layers

TOLERANCE = 1e-12


@dataclass(frozen=True)
class Certificate:
    """Outcome of `certify`.

    Attributes:
        max_difference: largest absolute difference of a logit or an FFN output, in float64.
        against: what was compared with, since some routings scale the FFN by design.
    """

    max_difference: float
    against: str

    def __str__(self) -> str:
        return f"step-0 certificate: equal to {self.against} within {self.max_difference:.1e} in float64"


@torch.no_grad()
def certify(dense: nn.Module, upcycled: nn.Module, tolerance: float = TOLERANCE, **inputs: Any) -> Certificate:
    """Compare an upcycled model with its dense parent, both in float64 and in evaluation mode.

    Compared are the logits, and every replaced FFN by itself on what the parent feeds it: norms that compute in fp32
    whatever the model's type would hide a small difference from the logits.

    Where gate weights do not sum to one by design (a raw top-1 probability p; 1 + p with a universal FFN; choices
    dropped for capacity), the parent's FFN outputs are multiplied by the gates' sum, and the certificate says so.

    Args:
        dense, upcycled: models that return an object with `logits`; neither is changed.
        tolerance: largest difference accepted.
        **inputs: what both models are called with.

    Raises:
        ValueError: something differs by more than the tolerance.
    """
    inputs = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    moe = copy.deepcopy(upcycled).double().eval()
    reference = copy.deepcopy(dense).double().eval()
    layers = moe_layers(moe)
    differences: dict[str, float] = {}
    with torch.random.fork_rng():  # routing noise, if any, is the same for both
        torch.manual_seed(0)
        actual = moe(**inputs).logits
        for name, layer in layers.items():
            reference.get_submodule(name).register_forward_hook(_compare_with(layer, name, differences))
        torch.manual_seed(0)
        expected = reference(**inputs).logits
    differences["the logits"] = float((actual - expected).abs().max())
    num_scaled = sum(_scales(layer) for layer in layers.values())
    against = "the dense model"
    if num_scaled:
        against += f" with {num_scaled} FFN outputs multiplied by the sum of their gates (this routing scales them)"
    where, difference = max(differences.items(), key=lambda item: item[1])
    if not difference <= tolerance:
        raise ValueError(
            f"the upcycled model differs from {against}: {where} by {difference:.3e}, more than {tolerance:.0e}. "
            "Is it freshly upcycled, and from this very parent?"
        )
    return Certificate(difference, against)


def _scales(layer: MoELayer) -> bool:
    complements = layer.has_universal and layer.universal_weight == "complement"
    return not complements and (layer.has_universal or not layer.router.preserves_function)


def _compare_with(layer: MoELayer, name: str, differences: dict[str, float]) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        actual = layer(args[0])
        if _scales(layer):
            assert layer.last_routing is not None
            gates_T = layer.last_routing.top_k_weights_TK.sum(-1)
            if layer.has_universal:
                gates_T = gates_T + layer.universal_gates(layer.last_routing)
            output = output * gates_T.view(*output.shape[:-1], 1)
        differences[name] = float((actual - output).abs().max())
        return output

    return hook
