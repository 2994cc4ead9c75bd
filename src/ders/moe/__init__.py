"""Routers, experts and the layer that joins them (floor 1)."""

from ders.moe.execution import EXECUTIONS
from ders.moe.experts import SharedBaseExperts, VanillaExperts, set_execution
from ders.moe.ffn import FFN
from ders.moe.layer import UNIVERSAL_WEIGHTS, MoELayer, SharedBaseMoE, VanillaMoE, moe_layers, take_routings
from ders.moe.noisy import NoisyMLPRouter
from ders.moe.router import Router, Routing, TopKRouter, load_balancing_loss

__all__ = [
    "EXECUTIONS",
    "FFN",
    "UNIVERSAL_WEIGHTS",
    "MoELayer",
    "NoisyMLPRouter",
    "Router",
    "Routing",
    "SharedBaseExperts",
    "SharedBaseMoE",
    "TopKRouter",
    "VanillaExperts",
    "VanillaMoE",
    "load_balancing_loss",
    "moe_layers",
    "set_execution",
    "take_routings",
]
