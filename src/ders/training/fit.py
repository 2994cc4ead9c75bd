"""Running one stage with Lightning."""

import csv
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader

from ders.training.allocator import keep_freed_memory
from ders.training.batches import StepBatches
from ders.training.callbacks import PlainProgress, RoutingMonitor, Throughput
from ders.training.checkpoints import Checkpoints, Saved
from ders.training.modules import StageModule
from ders.training.processes import StopOnSignal, missing_processes_named
from ders.training.stages import Stage, StageData
from ders.training.strategies import is_sharded, refuse_other_state, state_format

# Lightning's own lines (devices found, tips) would drown ours.
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
# The run folder exists before its logger does, and `_keep_rows` carries over what must stay.
warnings.filterwarnings("ignore", message=".*logs directory .* exists and is not empty.*")
warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
# `StepBatches` starts where the checkpoint stopped, without the loader's help.
warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
# What Lightning and DeepSpeed call is theirs to change; and a whole model does lie beside the shards.
warnings.filterwarnings("ignore", message=".*`torch.distributed.* is deprecated.*")
warnings.filterwarnings("ignore", message=".*each worker will save a shard of the checkpoint.*")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    lightning.seed_everything(seed, verbose=False)


class StageLoaders(lightning.LightningDataModule):
    """Loaders of one stage; the training loader starts where the checkpoint stopped."""

    def __init__(self, data: StageData, stage: Stage, seed: int) -> None:
        super().__init__()
        self.data, self.stage, self.seed = data, stage, seed

    def train_dataloader(self) -> DataLoader[Any]:
        workers = self.stage.num_workers
        return DataLoader(
            self.data.train,
            batch_sampler=self._batches(start=self.trainer.global_step * self.stage.accumulate),
            collate_fn=self.data.collate,
            num_workers=workers,
            # A worker that is stuck, on a dead file server perhaps, ends the job with an error.
            timeout=self.stage.data_timeout if workers else 0,
        )

    def val_dataloader(self) -> Any:
        by_loss = is_sharded(self.trainer.strategy) or self.data.validation is None
        return self.data.validation_loader(self.trainer.global_rank, self.trainer.world_size, by_loss=by_loss) or []

    def rows_of(self, batch_idx: int) -> list[int]:
        """The rows of a micro-batch, of all processes."""
        rows = self._batches().rows_of_step(batch_idx // self.stage.accumulate)
        return rows.view(self.stage.accumulate, -1)[batch_idx % self.stage.accumulate].tolist()

    def _batches(self, start: int = 0) -> StepBatches:
        return StepBatches(
            len(self.data.train),  # type: ignore[arg-type]
            self.stage.global_batch_size,
            self.stage.steps,
            accumulate=self.stage.accumulate,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start=start,
            lengths=self.data.lengths,
        )


def fit(
    stage: Stage,
    module: StageModule,
    data: StageData,
    make_trainer: Callable[..., lightning.Trainer],
    *,
    label: str,
    folder: Path,
    seed: int,
    loggers: list[Logger] | None = None,
    max_steps: int | None = None,
    resume: Saved | None = None,
    provenance: dict[str, Any] | None = None,
    keep_last: int = 2,
    callbacks: Sequence[Callback] = (),
) -> lightning.Trainer:
    """Train one stage.

    Args:
        stage: `sized`.
        make_trainer: partial of `lightning.Trainer` with devices, strategy and precision bound.
        label: names the stage in progress lines.
        folder: receives `checkpoints/` and `metrics.csv`.
        loggers: loggers beside the CSV one.
        max_steps: stop here, though the schedule is laid out for the stage's own number of steps.
        resume: continue from this checkpoint; the run ends as if it had never stopped.
        provenance: noted in the model folders of checkpoints.
        keep_last: so many checkpoints are kept, and the best.
        callbacks: of the method, which run before all others.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint stays.
        OSError: a checkpoint could not be written; the one before it stays.
        Interrupted: a signal stopped it, after a checkpoint.
        DeadProcessError: another process of the job is gone.
        ValueError: `resume` cannot be continued by these processes.
    """
    keep_freed_memory()
    csv_logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=50)
    own: list[Callback] = [
        *callbacks,
        RoutingMonitor(),
        Throughput(),
        RichProgressBar(console_kwargs={"stderr": True}) if sys.stderr.isatty() else PlainProgress(label),
    ]
    checkpoints = None
    if stage.save_every is not None:
        checkpoints = Checkpoints(
            folder / "checkpoints", module.bundle, stage.save_every, provenance=provenance, keep_last=keep_last
        )
        own.append(checkpoints)
    own.append(StopOnSignal(checkpoints))
    if stage.device_batch_size is not None:
        stage = stage.on_devices(_world_size(make_trainer))
    steps = stage.steps if max_steps is None else min(max_steps, stage.steps)
    trainer = make_trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=stage.accumulate,
        gradient_clip_val=stage.gradient_clip,
        val_check_interval=stage.validate_every * stage.accumulate if data.validates else None,  # type: ignore
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if data.validates else 0,
        callbacks=own,
        logger=[csv_logger, *(loggers or [])],
        default_root_dir=folder,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_checkpointing=stage.save_every is not None,
        enable_progress_bar=sys.stderr.isatty(),
    )
    if resume is not None:
        _refuse_other_processes(resume, trainer)
        if trainer.global_rank == 0:
            _keep_rows(csv_logger, resume)
    module.train()  # Hugging Face loads in evaluation mode
    ckpt_path = None if resume is None else resume.state_path
    with missing_processes_named():
        trainer.fit(module, StageLoaders(data, stage, seed), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def _refuse_other_processes(saved: Saved, trainer: lightning.Trainer) -> None:
    refuse_other_state(asdict(saved), state_format(trainer.strategy), trainer.world_size)
    # Lightning counts micro-batches through: another number of them would mix two steps' rows from here on.
    if saved.accumulate != trainer.accumulate_grad_batches:
        raise ValueError(
            f"the checkpoint was written with {saved.accumulate} micro-batches a step, and on these devices there are "
            f"{trainer.accumulate_grad_batches}: continue on as many devices as before, or set device_batch_size so "
            "that their number is the same"
        )


def _world_size(make_trainer: Callable[..., lightning.Trainer]) -> int:
    """Processes of a trainer, which only it knows where its devices are `auto`."""
    probe = make_trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return probe.num_devices * probe.num_nodes


def _keep_rows(logger: CSVLogger, saved: Saved) -> None:
    """Carry the rows up to a checkpoint over: Lightning's writer begins with an empty file."""
    file, step = Path(logger.log_dir) / "metrics.csv", saved.step
    kept = []
    if file.exists():
        with file.open(newline="") as rows:
            kept = [row for row in csv.DictReader(rows) if int(row["step"]) < step]
    for row in kept:
        metrics = {key: float(value) for key, value in row.items() if key != "step" and value != ""}
        logger.experiment.log_metrics(metrics, int(row["step"]))
    if not any(int(row["step"]) == step - 1 and row.get("train/loss") for row in kept):
        logger.experiment.log_metrics(saved.last_row, step - 1)
    logger.save()
