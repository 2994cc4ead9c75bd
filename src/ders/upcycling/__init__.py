"""From a dense model to a Mixture-of-Experts model, in place, on any `nn.Module` of a known family (floor 2)."""

from ders.upcycling.certificate import Certificate, certify
from ders.upcycling.description import Upcycling, describe_delta
from ders.upcycling.families import FAMILIES, Family, find_decoder, require_family
from ders.upcycling.routers import save_routers
from ders.upcycling.surgery import (
    UpcyclingSummary,
    apply,
    choose_layers,
    delta_maker,
    upcycle,
)
from ders.upcycling.trainable import MOE_TRAINABLE, TRAINABLE, set_trainable

__all__ = [
    "FAMILIES",
    "MOE_TRAINABLE",
    "TRAINABLE",
    "Certificate",
    "Family",
    "Upcycling",
    "UpcyclingSummary",
    "apply",
    "certify",
    "choose_layers",
    "delta_maker",
    "describe_delta",
    "find_decoder",
    "require_family",
    "save_routers",
    "set_trainable",
    "upcycle",
]
