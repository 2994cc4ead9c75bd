"""Running one stage with Lightning."""

import csv
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader

from ders.training.batches import StepBatches
from ders.training.callbacks import AtomicCheckpointIO, LastCheckpoint, PlainProgress, RoutingMonitor, Throughput
from ders.training.modules import StageModule
from ders.training.stages import Stage, StageData

# Lightning's own lines (devices found, tips) would drown ours.
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
# The run folder exists before its logger does, and `_keep_rows` carries over what must stay.
warnings.filterwarnings("ignore", message=".*logs directory .* exists and is not empty.*")
warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
# `StepBatches` starts where the checkpoint stopped, without the loader's help.
warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    lightning.seed_everything(seed, verbose=False)


class StageLoaders(lightning.LightningDataModule):
    """Loaders of one stage; the training loader starts where the checkpoint stopped."""

    def __init__(self, data: StageData, stage: Stage, seed: int) -> None:
        super().__init__()
        self.data, self.stage, self.seed = data, stage, seed

    def train_dataloader(self) -> DataLoader[Any]:
        batches = StepBatches(
            len(self.data.train),  # type: ignore[arg-type]
            self.stage.global_batch_size,
            self.stage.steps,
            accumulate=self.stage.accumulate,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start=self.trainer.global_step * self.stage.accumulate,
            lengths=self.data.lengths,
        )
        return DataLoader(
            self.data.train, batch_sampler=batches, collate_fn=self.data.collate, num_workers=self.stage.num_workers
        )

    def val_dataloader(self) -> Any:
        return self.data.validation_loader(self.trainer.global_rank, self.trainer.world_size) or []


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
    ckpt_path: Path | None = None,
) -> lightning.Trainer:
    """Train one stage.

    Args:
        stage: `sized`.
        make_trainer: partial of `lightning.Trainer` with devices, strategy and precision bound.
        label: names the stage in progress lines.
        folder: receives `checkpoints/last.ckpt` and `metrics.csv`.
        loggers: loggers beside the CSV one.
        max_steps: stop here, though the schedule is laid out for the stage's own number of steps.
        ckpt_path: continue from this checkpoint; the run ends as if it had never stopped.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint stays.
        OSError: a checkpoint could not be written; the one before it stays.
    """
    csv_logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=50)
    callbacks: list[Callback] = [
        RoutingMonitor(),
        Throughput(),
        RichProgressBar(console_kwargs={"stderr": True}) if sys.stderr.isatty() else PlainProgress(label),
    ]
    if stage.save_every is not None:
        callbacks.append(LastCheckpoint(folder / "checkpoints" / "last.ckpt", stage.save_every))
    if stage.device_batch_size is not None:
        stage = stage.on_devices(_world_size(make_trainer))
    steps = stage.steps if max_steps is None else min(max_steps, stage.steps)
    trainer = make_trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=stage.accumulate,
        gradient_clip_val=stage.gradient_clip,
        val_check_interval=None if data.validation is None else stage.validate_every * stage.accumulate,  # type: ignore
        check_val_every_n_epoch=None,
        limit_val_batches=0 if data.validation is None else 1.0,
        callbacks=callbacks,
        logger=[csv_logger, *(loggers or [])],
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_checkpointing=stage.save_every is not None,
        enable_progress_bar=sys.stderr.isatty(),
    )
    if ckpt_path is not None and trainer.global_rank == 0:
        _keep_rows(csv_logger, ckpt_path)
    module.train()  # Hugging Face loads in evaluation mode
    trainer.fit(module, StageLoaders(data, stage, seed), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def _world_size(make_trainer: Callable[..., lightning.Trainer]) -> int:
    """Processes of a trainer, which only it knows where its devices are `auto`."""
    probe = make_trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return probe.num_devices * probe.num_nodes


def _keep_rows(logger: CSVLogger, ckpt_path: Path) -> None:
    """Carry the rows up to a checkpoint over: Lightning's writer begins with an empty file."""
    file = Path(logger.log_dir) / "metrics.csv"
    checkpoint = torch.load(ckpt_path, weights_only=True, mmap=True, map_location="cpu")
    step = checkpoint["global_step"]
    kept = []
    if file.exists():
        with file.open(newline="") as rows:
            kept = [row for row in csv.DictReader(rows) if int(row["step"]) < step]
    for row in kept:
        metrics = {key: float(value) for key, value in row.items() if key != "step" and value != ""}
        logger.experiment.log_metrics(metrics, int(row["step"]))
    if not any(int(row["step"]) == step - 1 and row.get("train/loss") for row in kept):
        logger.experiment.log_metrics(checkpoint["ders_last_row"], step - 1)
    logger.save()
