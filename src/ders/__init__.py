"""Mixture-of-Experts upcycling with one shared base weight and tiny expert deltas (DeRS, arXiv 2503.01359).

Importing this package needs torch, transformers and safetensors only, and lets transformers' own `from_pretrained` load
folders of upcycled models.
"""

from ders.accounting import count_parameters
from ders.compression import compress, compress_folder
from ders.deltas import (
    Delta,
    LowRankByLayerDelta,
    LowRankByLoadDelta,
    LowRankDelta,
    NeuronDelta,
    QuantizedDelta,
    RegrownSparseDelta,
    ScoredSparseDelta,
    SparseDelta,
    ZeroDelta,
)
from ders.models import efficientnet
from ders.models.adapters import load_adapter, save_adapter
from ders.models.exporting import export
from ders.models.registration import register
from ders.moe import NoisyMLPRouter, Router, TopKRouter, set_execution
from ders.upcycling import certify, save_routers, set_trainable, upcycle
from ders.upcycling.adapters import adapters, remove_adapter, set_adapter
from ders.upcycling.loads import allot_by_load
from ders.upcycling.positions import choose_by_fisher

__version__ = "0.1.0"

register()
efficientnet.register()

__all__ = [
    "Delta",
    "LowRankByLayerDelta",
    "LowRankByLoadDelta",
    "LowRankDelta",
    "NeuronDelta",
    "NoisyMLPRouter",
    "QuantizedDelta",
    "RegrownSparseDelta",
    "Router",
    "ScoredSparseDelta",
    "SparseDelta",
    "TopKRouter",
    "ZeroDelta",
    "adapters",
    "allot_by_load",
    "certify",
    "choose_by_fisher",
    "compress",
    "compress_folder",
    "count_parameters",
    "export",
    "load_adapter",
    "remove_adapter",
    "save_adapter",
    "save_routers",
    "set_adapter",
    "set_execution",
    "set_trainable",
    "upcycle",
]
