"""Few tokens at a time: one MoE layer where its weights are read for one or a handful of tokens, and generation."""

import time
from typing import Any

from ders.evaluation.cells import Cell
from ders.evaluation.generation import measure_generation
from ders.evaluation.goals import DECODE, error_goals, time_goals
from ders.evaluation.layer_suite import MANY, grid, measure_cells, say
from ders.evaluation.options import Options, Shares
from ders.evaluation.whole_models import MODELS, MODELS_CPU, shares

# Of the time, what the layers get; generation gets the rest.
LAYERS = 0.55


def decode_suite(options: Options) -> dict[str, Any]:
    """Forward of layers for fewer tokens than a prompt has, and generation of whole models; errors, goals."""
    started = time.perf_counter()
    device, dtype = options.chosen_device, options.chosen_dtype
    tokens_of, mixtures = grid(options)
    cells = [
        Cell(shape, mixture, tokens, backward=False)
        for shape, tokens_T in tokens_of.items()
        for mixture in mixtures
        for tokens in tokens_T
        if tokens < MANY
    ]
    measured = measure_cells(cells, options, options.budget_seconds * LAYERS)
    names = MODELS_CPU if device == "cpu" else tuple(MODELS)
    models = []
    left = options.budget_seconds - (time.perf_counter() - started)
    parts = Shares(left, shares(names), time.perf_counter)
    for name in names:
        models += measure_generation(name, device, dtype, parts.take())
        say(f"generation of {name}", started)
    return {
        **measured,
        "models": models,
        "seconds": round(time.perf_counter() - started, 1),
        "goals": [*time_goals(DECODE, measured["rows"], device), *error_goals(measured["errors"])],
    }
