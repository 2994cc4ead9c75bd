"""Whole models: a training step and generation, dense, vanilla and every form over a shared base."""

import gc
import time
from typing import Any

import torch

from ders.evaluation.cells import compared
from ders.evaluation.generation import PROMPTS, measure_generation
from ders.evaluation.goals import state_goals
from ders.evaluation.layer_suite import say
from ders.evaluation.model_memory import model_memory
from ders.evaluation.options import Options, Shares, dials
from ders.evaluation.timing import Variant, paired, significant, spread, stopwatch_of
from ders.evaluation.whole_models import (
    DENSE,
    FORMS,
    MODELS,
    MODELS_CPU,
    VANILLA,
    Training,
    dense_model,
    make_form,
    random_batch,
    shares,
    weight_bytes,
)

Row = dict[str, Any]

# How many sequences, of how many tokens.
BATCH_CPU, BATCH_GPU = (2, 128), (4, 1024)
# Of the time of a model, what its generation gets.
GENERATION = 0.25


def train_suite(options: Options) -> dict[str, Any]:
    """Time, tokens a second and memory of every model and form; goals."""
    started = time.perf_counter()
    device, dtype = options.chosen_device, options.chosen_dtype
    batch = BATCH_CPU if device == "cpu" else BATCH_GPU
    names = MODELS_CPU if device == "cpu" else tuple(MODELS)
    models: list[Row] = []
    memory: list[Row] = []
    parts = Shares(options.budget_seconds, shares(names), time.perf_counter)
    for name in names:
        ends = time.perf_counter() + parts.take()
        memory += with_ratios(name, model_memory(name, device, dtype, batch, PROMPTS[0]))
        say(f"memory of {name}", started)
        left = max(0.0, ends - time.perf_counter())
        models += measure_generation(name, device, dtype, left * GENERATION)
        say(f"generation of {name}", started)
        models += measure_training(name, device, dtype, batch, max(0.0, ends - time.perf_counter()))
        say(f"training steps of {name}", started)
    return {
        "dials": dials(options),
        "models": models,
        "memory": memory,
        "seconds": round(time.perf_counter() - started, 1),
        "goals": state_goals(memory),
    }


def measure_training(name: str, device: str, dtype: torch.dtype, batch: tuple[int, int], budget: float) -> list[Row]:
    """A row for each form. Dense and vanilla stand beside each other form in turn: all at once are too large."""
    dense = dense_model(name, device, dtype)
    data = random_batch(dense, *batch)
    base, vanilla = (Training(make_form(dense, form), data) for form in (DENSE, VANILLA))
    others = [form for form in FORMS if form not in (DENSE, VANILLA)]
    rows: list[Row] = []
    ends = time.perf_counter() + budget
    for number, form in enumerate(others):
        one = Training(make_form(dense, form), data)
        share = max(0.0, ends - time.perf_counter()) / (len(others) - number)
        variants = [Variant(VANILLA, vanilla.step), Variant(form, one.step)]
        reference, series = paired(base.step, variants, stopwatch_of(device), share)
        found = {DENSE: reference, **series}
        models = {DENSE: base.model, VANILLA: vanilla.model, form: one.model}
        for method, measured in found.items():
            if number > 0 and method != form:
                continue  # dense and vanilla are told by their first rounds
            row = {
                "model": name,
                "phase": "training step",
                "batch": batch[0],
                "length": batch[1],
                "method": method,
                "ms": significant(measured.wall * 1e3),
                "cpu_ms": significant(measured.cpu * 1e3),
                "rounds": len(measured.samples),
                "tokens_per_second": significant(batch[0] * batch[1] / measured.wall),
                "weight_bytes": weight_bytes(models[method]),
            }
            if method != DENSE:
                row["to_dense"] = spread(measured.to_reference)
                row["to_vanilla"] = compared(measured, series[VANILLA])
            rows.append(row)
        del one, variants, models, series, found
        gc.collect()
    return rows


def with_ratios(name: str, found: dict[str, dict[str, int | None]]) -> list[Row]:
    """Bytes of every form, and over dense."""
    rows = []
    for form, sizes in found.items():
        row: Row = {"model": name, "method": form, **sizes}
        for key, value in sizes.items():
            own = found[DENSE][key]
            row[f"{key.removesuffix('_bytes')}_to_dense"] = significant(value / own) if value and own else None
        rows.append(row)
    return rows
