"""Mixture-of-Experts upcycling with one shared base weight and tiny expert deltas (DeRS, arXiv 2503.01359).

Importing this package needs torch, transformers and safetensors only, and lets transformers' own `from_pretrained` load
folders of upcycled models.
"""

from ders.accounting import count_parameters
from ders.deltas import Delta, LowRankDelta, QuantizedDelta, SparseDelta, ZeroDelta
from ders.models.registration import register
from ders.moe import Router, TopKRouter
from ders.upcycling import certify, set_trainable, upcycle

__version__ = "0.1.0"

register()

__all__ = [
    "Delta",
    "LowRankDelta",
    "QuantizedDelta",
    "Router",
    "SparseDelta",
    "TopKRouter",
    "ZeroDelta",
    "certify",
    "count_parameters",
    "set_trainable",
    "upcycle",
]
