"""Deltas: what an expert adds to the base weight (floor 0).

Every module of this package is imported here, so a new form is one file: defining the class is registering it.
"""

import importlib
import pkgutil

from ders.deltas.base import Delta, Place
from ders.deltas.by_layer import LowRankByLayerDelta
from ders.deltas.by_load import LowRankByLoadDelta
from ders.deltas.low_rank import LowRankDelta
from ders.deltas.neurons import NeuronDelta
from ders.deltas.quantized import QuantizedDelta
from ders.deltas.regrown import RegrownSparseDelta
from ders.deltas.scored import ScoredSparseDelta
from ders.deltas.sparse import SparseDelta
from ders.deltas.zero import ZeroDelta

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Delta",
    "LowRankByLayerDelta",
    "LowRankByLoadDelta",
    "LowRankDelta",
    "NeuronDelta",
    "Place",
    "QuantizedDelta",
    "RegrownSparseDelta",
    "ScoredSparseDelta",
    "SparseDelta",
    "ZeroDelta",
]
