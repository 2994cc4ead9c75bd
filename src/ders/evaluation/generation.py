"""Prefill and decoding of whole models, all forms of one model in the same rounds."""

import gc
from typing import Any

import torch

from ders.evaluation.cells import compared
from ders.evaluation.timing import Variant, paired, significant, spread, stopwatch_of
from ders.evaluation.whole_models import (
    DENSE,
    FORMS,
    VANILLA,
    Generation,
    dense_model,
    make_form,
    random_batch,
    weight_bytes,
)

Row = dict[str, Any]

# Prompts: (how many, of how many tokens); each is prefilled, then continued.
PROMPTS = ((1, 128), (16, 16))
NEW_TOKENS = 8


def measure_generation(name: str, device: str, dtype: torch.dtype, budget: float) -> list[Row]:
    """A row for each form, prompt and part, in about `budget` seconds."""
    dense = dense_model(name, device, dtype)
    models = {form: make_form(dense, form) for form in FORMS}
    del dense
    rows = []
    for batch_size, length in PROMPTS:
        batch = random_batch(models[DENSE], batch_size, length)
        running = {form: Generation(model, batch, NEW_TOKENS) for form, model in models.items()}
        for part in ("prefill", "decode"):
            gc.collect()
            variants = [Variant(form, getattr(one, part)) for form, one in running.items() if form != DENSE]
            base, series = paired(
                getattr(running[DENSE], part), variants, stopwatch_of(device), budget / (2 * len(PROMPTS))
            )
            tokens = batch_size * (length if part == "prefill" else NEW_TOKENS)
            for form, one in {DENSE: base, **series}.items():
                row = {
                    "model": name,
                    "phase": part,
                    "batch": batch_size,
                    "length": length,
                    "method": form,
                    "ms": significant(one.wall * 1e3),
                    "cpu_ms": significant(one.cpu * 1e3),
                    "rounds": len(one.samples),
                    "tokens_per_second": significant(tokens / one.wall),
                    "weight_bytes": weight_bytes(models[form]),
                }
                if form != DENSE:
                    row["to_dense"] = spread(one.to_reference)
                    row["to_vanilla"] = compared(one, series[VANILLA])
                rows.append(row)
    return rows
