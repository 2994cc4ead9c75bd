"""One MoE layer against the dense FFN it came from, against vanilla layers, and against rebuilding its experts."""

import itertools
import sys
import time
from typing import Any

import torch

from ders.evaluation.cells import Cell, Stand, measure_cell
from ders.evaluation.goals import BIG, LAYER, SMALL, error_goals, memory_goals, time_goals
from ders.evaluation.layer_memory import activation_memory
from ders.evaluation.layers import LM, METHODS, SM, SPARSE, THIN, Mixture, Shape
from ders.evaluation.options import Options, Shares, dials
from ders.evaluation.roofline import Ceilings, ceilings
from ders.evaluation.timing import significant

Row = dict[str, Any]

# By shape: numbers of tokens.
TOKENS: dict[Shape, tuple[int, ...]] = {BIG: (1, 16, 256), SMALL: (1, 16, 256, 2048)}
TOKENS_GPU: dict[Shape, tuple[int, ...]] = {BIG: (1, 16, 128, 256, 2048), SMALL: (1, 16, 256, 2048)}
TOKENS_FULL: dict[Shape, tuple[int, ...]] = {
    BIG: (1, 16, 128, 256, 2048, 8192),
    SMALL: (1, 16, 128, 256, 2048, 8192),
    Shape(2560, 10240, gated=False): (1, 16, 128, 256, 2048, 8192),
    Shape(4096, 14336): (1, 16, 128, 256, 2048, 8192),
}
MIXTURES, MIXTURES_FULL = (Mixture(),), (Mixture(), Mixture(experts=8), Mixture(top_k=1))
# From here on a layer is trained with so many tokens, and a prompt has them.
MANY = 256
# Where activations outweigh the gradient of one weight matrix.
MEMORY_TOKENS = 1024


def grid(options: Options) -> tuple[dict[Shape, tuple[int, ...]], tuple[Mixture, ...]]:
    """Numbers of tokens by shape, and the mixtures."""
    if options.grid == "full":
        return TOKENS_FULL, MIXTURES_FULL
    return (TOKENS if options.chosen_device == "cpu" else TOKENS_GPU), MIXTURES


def layer_suite(options: Options) -> dict[str, Any]:
    """Forward for every number of tokens, forward + backward where there are many; errors, memory, goals."""
    tokens_of, mixtures = grid(options)
    cells = [
        Cell(shape, mixture, tokens, backward, (SM, LM, SPARSE) if backward else tuple(METHODS))
        for shape, tokens_T in tokens_of.items()
        for mixture in mixtures
        for backward in (False, True)
        for tokens in tokens_T
        if tokens >= MANY or not backward
    ]
    # Memory first: what is left of the time then goes to the rounds.
    started = time.perf_counter()
    device, dtype = options.chosen_device, options.chosen_dtype
    memory = [
        row for shape in tokens_of for row in activation_memory(shape, Mixture(), MEMORY_TOKENS, device, dtype, THIN)
    ]
    say(f"memory of {len(tokens_of)} shapes", started)
    left = options.budget_seconds - (time.perf_counter() - started)
    measured = measure_cells(cells, options, left)
    return {
        **measured,
        "seconds": round(time.perf_counter() - started, 1),
        "memory": memory,
        "goals": [
            *time_goals(LAYER, measured["rows"], device),
            *memory_goals(memory),
            *error_goals(measured["errors"]),
        ],
    }


def measure_cells(cells: list[Cell], options: Options, budget: float) -> dict[str, Any]:
    """Rows of all cells, within about `budget` seconds; errors in both dtypes.

    Args:
        cells: those of one shape and mixture side by side: their layers are built once.
    """
    started, device, dtype = time.perf_counter(), options.chosen_device, options.chosen_dtype
    shares = Shares(budget, [cell.weight for cell in cells], time.perf_counter)
    limits: Ceilings = ceilings(device, dtype)
    say("ceilings of this machine", started)
    rows: list[Row] = []
    errors: list[Row] = []
    missing: dict[tuple[str, str], list[str]] = {}
    for (shape, mixture), group in itertools.groupby(cells, key=lambda cell: (cell.shape, cell.mixture)):
        mine = list(group)
        stand = Stand(shape, mixture, device, dtype)
        own_errors, exact = stand.errors(mine), stand.exact({cell.tokens for cell in mine})
        errors += _labelled(own_errors, dtype)
        say(f"errors: {shape.name}, {mixture.name}", started)
        for cell in mine:
            new, why = measure_cell(stand, cell, own_errors[cell], exact[cell.tokens], limits, shares.take())
            rows += new
            for name, reason in why.items():
                missing.setdefault((name, reason), []).append(cell.name)
            say(f"{cell.name}: {new[0]['rounds']} rounds", started)
        other = torch.bfloat16 if dtype == torch.float32 else torch.float32
        forward = [cell for cell in mine if not cell.backward and cell.tokens <= MANY]
        errors += _labelled(stand.cast(other).errors(forward), other)
        del stand, exact
    return {
        "dials": dials(options),
        "ceilings": vars(limits),
        "rows": rows,
        "errors": errors,
        "unavailable": [{"method": n, "reason": why, "cells": where} for (n, why), where in missing.items()],
        "seconds": round(time.perf_counter() - started, 1),
    }


def _labelled(errors: dict[Cell, dict[str, float]], dtype: torch.dtype) -> list[Row]:
    name = str(dtype).removeprefix("torch.")
    return [
        {"dtype": name, **cell.labels(), "method": method, "error": significant(error)}
        for cell, found in errors.items()
        for method, error in found.items()
    ]


def say(what: str, started: float) -> None:
    """A line of progress."""
    print(f"[{time.perf_counter() - started:5.0f} s] {what}", file=sys.stderr, flush=True)
