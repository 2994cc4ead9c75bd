"""Activation memory of layers. `python -m ders.evaluation.layer_memory TASK` is started by `activation_memory`."""

import json
import sys
from typing import Any

import torch

from ders.evaluation.layers import METHODS, Mixture, Shape, shared_layer, tokens_and_gradient, vanilla_layer
from ders.evaluation.memory import in_fresh_process, peak_bytes, saved_bytes, step_releasing_gradients

Row = dict[str, Any]


def activation_memory(
    shape: Shape, mixture: Mixture, tokens: int, device: str, dtype: torch.dtype, methods: tuple[str, ...]
) -> list[Row]:
    """Of dense, vanilla and the methods: bytes kept for backward, and the peak above weights and input."""
    task = {
        "shape": [shape.hidden, shape.ffn, shape.gated],
        "mixture": [mixture.experts, mixture.top_k],
        "tokens": tokens,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "methods": ["dense", "vanilla: ours", *methods],
    }
    found = memories(task) if device == "cuda" else in_fresh_process(__name__, task)
    dense = found["dense"]
    rows = []
    for name, row in found.items():
        ratios = {f"{key}_to_dense": row[key] / dense[key] if row[key] is not None else None for key in row}
        labels = {"shape": shape.name, "experts": mixture.experts, "top_k": mixture.top_k, "tokens": tokens}
        rows.append({**labels, "method": name, **row, **ratios})
    return rows


def memories(task: dict[str, Any]) -> dict[str, dict[str, int | None]]:
    """One layer after the other."""
    shape, mixture, device = Shape(*task["shape"]), Mixture(*task["mixture"]), task["device"]
    torch.manual_seed(0)
    found = {}
    for name in task["methods"]:
        with torch.device(device):
            layer = shape.dense().to(getattr(torch, task["dtype"]))
            if name in METHODS:
                layer = shared_layer(layer, shape, mixture, METHODS[name])
            elif name != "dense":
                layer = vanilla_layer(layer, shape, mixture)
        layer.train()
        x_TD, grad_TD = tokens_and_gradient(task["tokens"], shape.hidden, next(layer.parameters()))
        x_TD.requires_grad_()
        saved = saved_bytes(layer, lambda layer=layer, x_TD=x_TD: layer(x_TD))
        step = step_releasing_gradients(layer, x_TD, grad_TD)
        step()
        found[name] = {"saved_bytes": saved, "peak_bytes": peak_bytes(step, device)}
        del layer, step, x_TD, grad_TD
    return found


if __name__ == "__main__":
    print(json.dumps(memories(json.loads(sys.argv[1]))))
