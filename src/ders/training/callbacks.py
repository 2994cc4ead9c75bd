"""What is watched while a stage trains."""

import contextlib
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ders.kernels import global_sum
from ders.training.modules import LanguageModule


def log_now(trainer: lightning.Trainer, values: dict[str, float]) -> None:
    """Write values to every logger at this step alone: a module's own `log` would repeat them until the next."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step - 1)


def has_stepped(trainer: lightning.Trainer) -> bool:
    """Whether this micro-batch was its optimizer step's last."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches == 0


def is_due(trainer: lightning.Trainer, every_n_steps: int) -> bool:
    """After every n-th optimizer step and the last, and not after the micro-batches between."""
    return has_stepped(trainer) and (
        trainer.global_step % every_n_steps == 0 or trainer.global_step == trainer.max_steps
    )


class RoutingMonitor(Callback):
    """Logs, per MoE layer, each expert's share of the choices, the entropy of these shares and the dead experts.

    Entropy is divided by log E: 1 is balanced, 0 is collapse. An expert without a single choice since the last look is
    dead.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if not isinstance(module, LanguageModule) or not module.choices or not is_due(trainer, self.every_n_steps):
            return
        values = {}
        for name, counts_E in module.choices.items():
            counts_E = global_sum(counts_E)
            shares = (counts_E / counts_E.sum().clamp(min=1)).tolist()
            layer = f"routing/{layer_label(name)}"
            entropy = -sum(share * math.log(share) for share in shares if share > 0)
            values |= {f"{layer}/load_{expert}": share for expert, share in enumerate(shares)}
            values[f"{layer}/entropy"] = entropy / math.log(len(shares)) if len(shares) > 1 else 1.0
            values[f"{layer}/dead_experts"] = float(sum(share == 0 for share in shares))
        log_now(trainer, values)
        module.choices.clear()


def layer_label(name: str) -> str:
    """`layer_<index>` of a module name such as `model.language_model.layers.2.mlp`."""
    return f"layer_{next(part for part in reversed(name.split('.')) if part.isdigit())}"


class Throughput(Callback):
    """Logs tokens (or images, without tokens) per second since the last log, and peak memory in GiB."""

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self.tokens, self.since = 0, time.perf_counter()

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: dict[str, Tensor], _: int) -> None:
        if self.tokens == 0:
            self.since = time.perf_counter()
        self.tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["labels"].numel()

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if is_due(trainer, self.every_n_steps):
            speed = self.tokens * trainer.world_size / (time.perf_counter() - self.since)
            log_now(trainer, {"train/tokens_per_second": speed, "train/peak_gib": peak_gib()})
            self.tokens = 0


def reset_peak() -> None:
    """Forget the peak so far: a sweep runs many jobs in one process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux alone can
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Peak memory of this process in GiB since `reset_peak`: the accelerator's where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


class PlainProgress(Callback):
    """A line to stderr ten times a stage, where there is no terminal to draw a bar on."""

    def __init__(self, label: str) -> None:
        self.label, self.last = label, -1

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.started, self.first = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        step, total = trainer.global_step, trainer.max_steps
        if trainer.is_global_zero and step != self.last and (step == total or step % max(total // 10, 1) == 0):
            self.last = step
            seconds = time.perf_counter() - self.started
            left = seconds / max(step - self.first, 1) * (total - step)
            loss = trainer.callback_metrics.get("train/loss")
            shown = "" if loss is None else f"  loss {float(loss):.4f}"
            print(f"{self.label}: step {step}/{total}{shown}  {seconds:.0f} s, {left:.0f} s left", file=sys.stderr)
