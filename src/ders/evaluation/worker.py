"""Short trainings one after the other in one group of processes, for what compares strategies.

    torchrun --nproc-per-node 2 -m ders.evaluation.worker JOBS.json

Every job trains a small model on the same drawn conversations, some with an image and some without, and leaves its
losses, its model and what it measured in a folder.
"""

import contextlib
import functools
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import Dataset

from ders.accounting.memory import TrainedParams
from ders.data.loading import collate_conversations
from ders.deltas import LowRankDelta, SparseDelta
from ders.evaluation.memory import held_bytes, resident, restart_peak
from ders.models.bundle import outline_bundle
from ders.training import LanguageStage, schedule
from ders.training.building import Blueprint
from ders.training.checkpoints import find
from ders.training.fit import fit, seed_everything
from ders.training.stages import StageData
from ders.training.strategies import make_trainer
from ders.upcycling import upcycle

# AdamW does not feel how large all gradients are together, nor does anything that is clipped; plain descent does.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float], float | None]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}, 1.0),
    "sgd": (torch.optim.SGD, {"lr": 0.1}, None),
}
# None: no experts. An empty choice: full copies.
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "vanilla": {},
    "ders_sm": {"delta": functools.partial(SparseDelta, sparsity=0.9999)},
    "ders_lm": {"delta": functools.partial(LowRankDelta, rank=1)},
}


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        strategy: see `make_trainer`.
        parent: folder of the dense model.
        folder: receives `checkpoints/` and `metrics.csv`.
        stop_after: optimizer steps, of `steps`; later jobs may go on with `resume`.
        rows, length: rows of a step, tokens of a row.
        images: every second row has one.
        optimizer: one of `OPTIMIZERS`.
        measure_bytes: how far the second step's peak of memory is above what the process held before the model.
    """

    method: str
    strategy: str
    parent: str
    folder: str
    steps: int
    stop_after: int | None = None
    resume: bool = False
    devices: int = 1
    num_experts: int = 4
    top_k: int = 2
    precision: str = "32-true"
    rows: int = 8
    length: int = 12
    accumulate: int = 1
    images: bool = True
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    measure_bytes: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}, {self.strategy}"


class DrawnConversations(Dataset[dict[str, Any]]):
    """Rows of random tokens, every second one with a random picture: a pure function of their number."""

    def __init__(self, bundle: Any, length: int, *, images: bool) -> None:
        self.bundle, self.length, self.images = bundle, length, images

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(6, len(self.bundle.tokenizer), (self.length,), generator=generator).tolist()
        pixels = None
        if self.images and index % 2:
            size = self.bundle.model.config.vision_config.image_size
            pixels = torch.randn(3, size, size, generator=generator)
            ids = [self.bundle.model.config.image_token_id] * self.bundle.image_tokens + ids
        # Rows of unlike length: the mean over tokens must not depend on who holds which.
        return {"ids": ids[: len(ids) - index % 3], "labels": ([-100] * 4 + ids[4:])[: len(ids) - index % 3]} | {
            "pixels": pixels
        }


def run_job(job: Job) -> dict[str, Any]:
    """Train, and say what came of it; all processes must call it."""
    seed_everything(0)
    bundle = outline_bundle(Path(job.parent))

    def change(model: torch.nn.Module, gathered: Any = contextlib.nullcontext) -> None:
        options = METHODS[job.method]
        if options is not None:
            upcycle(model, num_experts=job.num_experts, top_k=job.top_k, gathered=gathered, **options)

    change(bundle.model)
    optimizer, options, clip = OPTIMIZERS[job.optimizer]
    stage = LanguageStage(
        trainable="paper",
        global_batch_size=job.rows,
        accumulate=job.accumulate,
        max_steps=job.steps,
        # Fused: its steps need no temporary copies, which are no state.
        optimizer=functools.partial(optimizer, fused=job.measure_bytes, **options),
        gradient_clip=clip,
        schedule=functools.partial(schedule, name="constant_with_warmup", warmup_fraction=0.0),
        save_every=max(1, job.stop_after or job.steps),
        gradient_checkpointing=job.gradient_checkpointing,
    )
    source: Any = SimpleNamespace(max_answer_tokens=4)
    blueprint = Blueprint(Path(job.parent), change)
    module = stage.module(bundle, source, None, seed=0, identity={}, blueprint=blueprint)  # type: ignore[arg-type]
    predicted = asdict(TrainedParams.of(bundle.model))
    rows = DrawnConversations(bundle, job.length, images=job.images)
    data = StageData(rows, functools.partial(collate_conversations, pad_id=bundle.tokenizer.pad_token_id))
    folder = Path(job.folder)
    held: list[int] = []
    factory = functools.partial(make_trainer, job.strategy, devices=job.devices, precision=job.precision)
    with _watching(module, held) if job.measure_bytes else contextlib.nullcontext():
        trainer = fit(
            stage,
            module,
            data,
            factory,
            label=job.name,
            folder=folder,
            seed=0,
            max_steps=job.stop_after,
            resume=find("last", folder / "checkpoints") if job.resume else None,
        )
    return {"step": trainer.global_step, "params": predicted, "held_bytes": max(held, default=0)}


@contextlib.contextmanager
def _watching(module: Any, held: list[int]) -> Iterator[None]:
    """Notes how far memory rises in the second step, when the optimizer's states are there, above what is held now."""
    before = held_bytes("cpu")

    def starts(batch: Any, batch_idx: int) -> None:
        type(module).on_train_batch_start(module, batch, batch_idx)
        if batch_idx == 1:
            restart_peak()

    def ends(outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            held.append(resident("VmHWM") - before)

    module.on_train_batch_start, module.on_train_batch_end = starts, ends
    yield


def main() -> None:
    jobs = [Job(**job) for job in json.loads(Path(sys.argv[1]).read_text())]
    for job in jobs:
        result = run_job(job)
        gc.collect()
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            (Path(job.folder) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
