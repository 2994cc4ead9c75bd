"""Memory of whole models. `python -m ders.evaluation.model_memory TASK` is started by `model_memory`."""

import gc
import json
import sys
from typing import Any

import torch

from ders.evaluation.memory import held_bytes, in_fresh_process, peak_bytes
from ders.evaluation.whole_models import DENSE, FORMS, Generation, Training, dense_model, make_form, random_batch


def model_memory(
    name: str, device: str, dtype: torch.dtype, training: tuple[int, int], prompt: tuple[int, int]
) -> dict[str, dict[str, int | None]]:
    """Of every form: what a training state holds, and the peaks of a training step and of generation, weights included.

    Args:
        training, prompt: how many sequences, of how many tokens.
    """
    task = {
        "model": name,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "training": training,
        "prompt": prompt,
    }
    found: dict[str, dict[str, int | None]] = memories(task) if device == "cuda" else in_fresh_process(__name__, task)
    return found


def memories(task: dict[str, Any]) -> dict[str, dict[str, int | None]]:
    """One form after the other."""
    device = task["device"]
    dense = dense_model(task["model"], device, getattr(torch, task["dtype"]))
    found = {}
    for form in (DENSE, *FORMS):  # what the first one finds cold is not its own: it is measured again
        before = held_bytes(device)
        model = make_form(dense, form)
        generation = Generation(model, random_batch(model, *task["prompt"]), 2)
        peaks = {"generation_peak_bytes": _whole_peak(lambda g=generation: (g.prefill(), g.decode()), device, before)}
        del generation
        training = Training(model, random_batch(model, *task["training"]))
        peaks["state_bytes"] = training.state_bytes()
        peaks["training_peak_bytes"] = _whole_peak(training.step, device, before)
        found[form] = peaks
        del model, training
        gc.collect()
    return found


def _whole_peak(run: Any, device: str, before: int) -> int | None:
    """The peak above what was held before the model was made."""
    gc.collect()
    held = held_bytes(device) - before
    above = peak_bytes(run, device)
    return None if above is None else held + above


if __name__ == "__main__":
    print(json.dumps(memories(json.loads(sys.argv[1]))))
