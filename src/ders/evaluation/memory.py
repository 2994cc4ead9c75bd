"""What a layer or a training step holds beside its weights, really measured.

On a CPU in a process of its own, where every freed block goes back to the system, so that the peak of resident memory
is that of live memory. On a GPU by torch's allocator.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Blocks of 64 KiB and more are mapped one by one, and unmapped when freed (mallopt(3)).
EXACT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_MMAP_MAX_": "1000000",
}


def saved_bytes(layer: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that the forward pass keeps for the backward pass: distinct storages, weights and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()  # it holds the graph, so that no address is given out twice
    del result
    return sum(kept.values())


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """How far memory rises above what is held before, while `run` runs; None where the system does not tell.

    On a CPU it is exact only in a process started by `in_fresh_process`.
    """
    gc.collect()
    before = held_bytes(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        restart_peak()
    except OSError:
        return None
    run()
    above = resident("VmHWM") - before
    return above if above > 0 else None  # too little to see: it fitted in pages that were there


def restart_peak() -> None:
    """The peak of resident memory starts again from here (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def held_bytes(device: str) -> int:
    """What is held now: resident memory of this process, or what torch has given out on the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return resident("VmRSS")


def resident(what: str) -> int:
    """Bytes of resident memory, `VmRSS` now or `VmHWM` at its peak (proc(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def step_releasing_gradients(layer: nn.Module, x_TD: Tensor, grad_TD: Tensor) -> Callable[[], None]:
    """Forward and backward, each weight's gradient let go as soon as it is there: what is left are activations."""

    def release(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(release)

    def step() -> None:
        layer(x_TD).backward(grad_TD)
        x_TD.grad = None

    return step


def in_fresh_process(module: str, task: dict[str, Any]) -> Any:
    """The JSON that `python -m MODULE TASK` prints, in a process that gives freed memory back at once.

    Raises:
        RuntimeError: it failed; the message ends with what it printed.
    """
    source = str(Path(__file__).parents[2])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(task)],
        env={**os.environ, **EXACT, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"measuring memory failed ({done.returncode}): {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
