"""`python train.py`: one run, from a dense parent to a record."""

import contextlib
import functools
import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ders.accounting import count_parameters
from ders.cli.apart import run_apart, starts_apart
from ders.cli.app import ROOT, UserError, launch, to_plain
from ders.cli.build import check, method_callbacks, trainer_factory, upcycle_by_config
from ders.cli.compressed import compress_and_score, score_folder, waiting_for, without_compression
from ders.cli.instantiation import instantiate
from ders.cli.parents import parent_folder, parent_scores
from ders.cli.runs import alone_in, checkpoint_of, command_of, finished, prepare_folder
from ders.cli.search import check_search, validation_score
from ders.cli.sweeps import told
from ders.data import DataSource, PreparedData
from ders.data.conversation import PROMPTS
from ders.models.bundle import outline_bundle, stored_bytes, weights_sha256
from ders.reporting import RecordError, finish_record, start_record, write_record
from ders.reporting.figures import draw_run
from ders.reporting.identity import identity, run_folder
from ders.training import Stage
from ders.training.building import Blueprint
from ders.training.callbacks import peak_gib, reset_peak
from ders.training.checkpoints import Saved, find, publish
from ders.training.fit import fit, seed_everything
from ders.training.loggers import ForgivingLogger, report
from ders.training.processes import (
    Interrupted,
    die_with_parent,
    is_first_process,
    leading,
    started_by_lightning,
    terminable,
)

log = logging.getLogger(__name__)


def main() -> None:
    with told():
        launch(run, "train")


def run(config: DictConfig) -> float | None:
    """One job. Prints the path of its record as the last line on stdout; returns its validation score, for searches."""
    plain = to_plain(config)
    folder = run_folder(plain, ROOT)
    if config.skip_completed and finished(folder):
        log.info("%s has a finished record: skipped", folder)
        print(folder / "record.json", flush=True)
        return validation_score(folder)
    check(config)
    check_search(config)
    if starts_apart(config):
        run_apart(plain, folder, command_of(plain))
        return validation_score(folder)
    if started_by_lightning():
        die_with_parent()
    kind = _compression_of if config.get("compression") else _training_of
    try:
        work = kind(config, plain, folder)
        if not is_first_process():
            return None
        with alone_in(folder), _own_processes():
            return _record(plain, folder, work)
    except Interrupted as interrupted:
        # Not an error of this job alone: a sweep ends, too.
        print(interrupted, file=sys.stderr)
        raise SystemExit(128 + interrupted.signum) from interrupted


@dataclass(frozen=True)
class Work:
    """What a job does once its folder is ready.

    Attributes:
        do: fills the results as they come; returns why it stopped before its end, or None.
        resume: go on in the folder as it is, instead of from the beginning.
    """

    do: Callable[[dict[str, Any]], str | None]
    resume: bool = False


def _training_of(config: DictConfig, plain: dict[str, Any], folder: Path) -> Work:
    checkpoint = checkpoint_of(config, plain, folder)

    def train(results: dict[str, Any]) -> str | None:
        step, steps = _train_and_score(config, plain, folder, checkpoint, results)
        return None if step == steps else f"stopped at step {step} of {steps}; continue with ckpt_path=last"

    if not is_first_process():
        with terminable():
            train({})
    return Work(train, resume=checkpoint is not None)


def _compression_of(config: DictConfig, plain: dict[str, Any], folder: Path) -> Work:
    """The vanilla run of this configuration is trained first, once for all its compressions."""
    vanilla = without_compression(config)
    trained = run_folder(to_plain(vanilla), ROOT)
    with waiting_for(trained):
        if not finished(trained):
            log.info("no finished vanilla run of this configuration yet: training it")
            run(vanilla)
    if is_first_process() and not finished(trained):
        raise UserError(f"{trained} is not finished: continue it with ckpt_path=last and the same dials, then compress")
    return Work(functools.partial(compress_and_score, config, trained, folder))


def _record(plain: dict[str, Any], folder: Path, work: Work) -> float | None:
    """Does the work and writes its record, whatever happens."""
    record = start_record(ROOT, plain, command_of(plain))
    if record["dirty"]:
        log.warning("there are uncommitted changes: the record of this run says so, and results/ will not take it")
    prepare_folder(folder, plain, resume=work.resume)
    # What stays if this process is killed, and can say no more.
    killed = (
        "the job, or a process of it, was killed before it could say why: its log may; continue with ckpt_path=last"
    )
    write_record(finish_record(record, "interrupted", killed), folder / "record.json")
    results: dict[str, Any] = {}
    try:
        with terminable():
            stopped = work.do(results)
            ended = finish_record(record, "interrupted" if stopped else "finished", stopped, **results)
            path = write_record(ended, folder / "record.json")
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit | Interrupted) else "failed"
        try:
            (folder / "error.txt").write_text(traceback.format_exc())
            message = f"{type(error).__name__}: {error}"
            write_record(finish_record(record, status, message, **results), folder / "record.json")
        except (OSError, RecordError) as second:  # a full disk must not hide what happened first
            log.error("the record of this failure could not be written: %s", second)
        raise
    print(path, flush=True)
    return validation_score(folder)


def _train_and_score(
    config: DictConfig, plain: dict[str, Any], folder: Path, checkpoint: Saved | None, results: dict[str, Any]
) -> tuple[int, int]:
    """Fills `results` as they come; returns the step reached and the steps of the stage. Children only train."""
    cache = ROOT / config.output_dir / "cache"
    source: DataSource = instantiate(config.data)
    prepared = source.prepare(cache)
    results["data_hash"] = prepared.data_hash
    parent = parent_folder(config, source, prepared, cache)
    stage: Stage = instantiate(config.stage.moe).sized(prepared)

    started = time.perf_counter()
    reset_peak()
    with _loggers(config, plain, folder, checkpoint) as loggers:
        step, device = _train(config, plain, folder, checkpoint, stage, (source, prepared, parent), loggers, results)
        if device is not None:
            # Trainer and model know each other: without this they, gradients and moments would outlive the scoring.
            gc.collect()
            _publish(config.export, folder)
            results["stored_bytes"] = stored_bytes(folder / "model")
            results["metrics"] = score_folder(folder, source, prepared, device) | parent_scores(parent)
            draw_run(folder)
            report(loggers, folder, results["metrics"], step - 1)
            results["wall_seconds"] = round(time.perf_counter() - started, 2)
    return step, stage.steps


def _train(
    config: DictConfig,
    plain: dict[str, Any],
    folder: Path,
    checkpoint: Saved | None,
    stage: Stage,
    made_from: tuple[DataSource, PreparedData, Path],
    loggers: list[ForgivingLogger],
    results: dict[str, Any],
) -> tuple[int, torch.device | None]:
    """The step reached, and where the first process of the training had its model; None in the others."""
    source, prepared, parent = made_from
    seed_everything(config.seed)
    bundle = outline_bundle(parent)
    log.info("%s", upcycle_by_config(bundle.model, config) or "dense control: no FFN is replaced")
    module = stage.module(
        bundle,
        source,
        prepared,
        seed=config.seed,
        identity=identity(plain),
        blueprint=Blueprint(parent, lambda model, whole: upcycle_by_config(model, config, whole)),
        skip_spikes=config.skip_spikes,
    )
    results.update(vars(count_parameters(bundle.model)))
    trainer = fit(
        stage,
        module,
        stage.data(bundle, source, prepared),
        trainer_factory(config),
        label=config.method.name,
        folder=folder,
        seed=config.seed,
        loggers=loggers,
        max_steps=config.trainer.max_steps,
        resume=checkpoint,
        provenance=_provenance(config, source, prepared, parent) if is_first_process() else None,
        keep_last=config.keep_checkpoints,
        callbacks=method_callbacks(config),
    )
    if not trainer.is_global_zero:
        return trainer.global_step, None
    results["peak_gib"] = peak_gib()  # of the training: what is loaded to score it comes later
    _wait_for_children(trainer)
    return trainer.global_step, trainer.strategy.root_device


def _publish(which: str, folder: Path) -> None:
    """The last checkpoint's model, or the best one's, becomes the run's."""
    saved = find(which, folder / "checkpoints")
    assert saved is not None
    if which == "best":
        log.info("model/ is that of step %d, which validated best", saved.step)
    publish(saved.folder, folder / "model")


def _provenance(config: DictConfig, source: DataSource, prepared: PreparedData, parent: Path) -> dict[str, Any]:
    """Where a model came from and what it was trained on, for commands that meet its folder later."""
    data = HydraConfig.get().runtime.choices.get("data") if HydraConfig.initialized() else None
    return {
        "data": data,
        "data_hash": prepared.data_hash,
        "split": "train",
        "scale": config.scale,
        "prompt": vars(PROMPTS[source.prompt]),
        "parent": str(parent.resolve()),
        "parent_sha256": weights_sha256(parent),
    }


@contextlib.contextmanager
def _loggers(
    config: DictConfig, plain: dict[str, Any], folder: Path, checkpoint: Saved | None
) -> Iterator[list[ForgivingLogger]]:
    """The loggers beside the CSV file, closed at the end: the next job of a sweep must not write into them."""
    if not config.logger or not is_first_process():
        yield []
        return
    start = 0 if checkpoint is None else checkpoint.step
    loggers = [
        ForgivingLogger(label, instantiate(node)(folder=folder, name=folder.name, start=start))
        for label, node in config.logger.items()
    ]
    status = "failed"
    try:
        for logger in loggers:
            logger.log_hyperparams(plain)
        yield loggers
        status = "success"
    finally:
        for logger in loggers:
            logger.close(status)


@contextlib.contextmanager
def _own_processes() -> Iterator[None]:
    """Keeps the processes of one job of a sweep apart from the next job's.

    Lightning starts its other processes with this process' arguments, which under a sweep would start the sweep again:
    they get the overrides of this very job, in single-run mode. And it leaves rank and address in the environment,
    by which the next job would take its own processes for started already.
    """
    arguments, environment = list(sys.argv), dict(os.environ)
    if HydraConfig.initialized():
        sys.argv = [sys.argv[0], *HydraConfig.get().overrides.task, "hydra.mode=RUN"]
    try:
        with leading():
            yield
    finally:
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)


def _wait_for_children(trainer: Any) -> None:
    for process in getattr(trainer.strategy.launcher, "procs", None) or []:
        process.wait()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
