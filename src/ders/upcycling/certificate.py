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
        max_difference: largest |logit difference| in float64.
        against: what was compared with, since some routings scale the FFN by design.
    """

    max_difference: float
    against: str

    def __str__(self) -> str:
        return f"step-0 certificate: logits equal those of {self.against} to {self.max_difference:.1e} in float64"


@torch.no_grad()
def certify(dense: nn.Module, upcycled: nn.Module, tolerance: float = TOLERANCE, **inputs: Any) -> Certificate:
    """Compare the logits of an upcycled model with its dense parent's, both in float64 and in evaluation mode.

    Where gate weights do not sum to one by design (a raw top-1 probability p; 1 + p with a universal FFN; choices
    dropped for capacity), the parent's FFN outputs are multiplied by the gates' sum, and the certificate says so.

    Args:
        dense, upcycled: models that return an object with `logits`; neither is changed.
        tolerance: largest difference accepted.
        **inputs: what both models are called with.

    Raises:
        ValueError: the logits differ by more than the tolerance.
    """
    inputs = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    moe = copy.deepcopy(upcycled).double().eval()
    actual = moe(**inputs).logits
    layers = moe_layers(moe)
    reference = copy.deepcopy(dense).double().eval()
    scaled = [layer for layer in layers.values() if layer.universal is not None or not layer.router.preserves_function]
    for name, layer in layers.items():
        if layer in scaled:
            reference.get_submodule(name).register_forward_hook(_scale_by_gates(layer))
    expected = reference(**inputs).logits
    difference = float((actual - expected).abs().max())
    against = "the dense model"
    if scaled:
        against += f" with {len(scaled)} FFN outputs multiplied by the sum of their gates (this routing scales them)"
    if not difference <= tolerance:
        raise ValueError(
            f"the upcycled model differs from {against}: logits by {difference:.3e}, more than {tolerance:.0e}. "
            "Is it freshly upcycled, and from this very parent?"
        )
    return Certificate(difference, against)


def _scale_by_gates(layer: MoELayer) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = args[0]
        gates = layer.router(hidden.reshape(-1, hidden.shape[-1])).top_k_weights_TK.sum(-1)
        if layer.universal is not None:
            gates = gates + 1
        return output * gates.view(*hidden.shape[:-1], 1)

    return hook
