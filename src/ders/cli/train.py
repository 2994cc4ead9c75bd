"""`python train.py`: one run, from a dense parent to a record."""

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ders.accounting import count_parameters
from ders.cli.app import ROOT, UserError, launch, to_plain
from ders.cli.build import check, instantiate, trainer_factory, upcycle_by_config
from ders.cli.identity import differences, identity, run_folder
from ders.cli.parents import parent_folder, parent_scores
from ders.data import DataSource, PreparedData
from ders.evaluation.scoring import score
from ders.models.bundle import load_bundle, save_bundle, stored_bytes
from ders.reporting import finish_record, read_record, start_record, write_record
from ders.reporting.figures import draw_run
from ders.training import Stage
from ders.training.callbacks import peak_gib
from ders.training.fit import fit

log = logging.getLogger(__name__)


def main() -> None:
    launch(run, "train")


def run(config: DictConfig) -> float | None:
    """One job. Prints the path of its record as the last line on stdout; returns the test accuracy, for searches."""
    plain = to_plain(config)
    folder = run_folder(plain, ROOT)
    first = _is_first_process()
    record = start_record(ROOT, plain, [Path(sys.argv[0]).name, *sys.argv[1:]])
    if config.skip_completed and _finished(folder):
        log.info("%s has a finished record: skipped", folder)
        print(folder / "record.json", flush=True)
        return None
    check(config)
    checkpoint = _checkpoint(config, plain, folder)
    if first:
        _prepare_folder(folder, plain, resume=checkpoint is not None)
    results: dict[str, Any] = {}
    try:
        with _own_processes():
            complete = _train_and_score(config, plain, folder, checkpoint, results)
    except BaseException as error:
        if first:
            status = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
            ended = finish_record(record, status, f"{type(error).__name__}: {error}", **results)
            write_record(ended, folder / "record.json")
        raise
    if not first:
        return None
    status = "finished" if complete else "interrupted"
    error = None if complete else "stopped by trainer.max_steps; continue with ckpt_path=last"
    path = write_record(finish_record(record, status, error, **results, peak_gib=peak_gib()), folder / "record.json")
    print(path, flush=True)
    return results["metrics"].get("test/accuracy", {}).get("value")


def _train_and_score(
    config: DictConfig, plain: dict[str, Any], folder: Path, checkpoint: Path | None, results: dict[str, Any]
) -> bool:
    """Fills `results` as they come; returns whether the stage ran to its end. Children return after the fit."""
    cache = ROOT / config.output_dir / "cache"
    source: DataSource = instantiate(config.data)
    prepared = source.prepare(cache)
    results["data_hash"] = prepared.data_hash
    parent = parent_folder(config, source, prepared, cache)

    lightning.seed_everything(config.seed, verbose=False)
    bundle = load_bundle(parent, dtype=torch.float32)
    summary = upcycle_by_config(bundle.model, config)
    log.info("%s", summary or "dense control: no FFN is replaced")

    stage: Stage = instantiate(config.stage.moe)
    module = stage.module(bundle, source, prepared, config.seed, identity(plain))
    results.update(vars(count_parameters(bundle.model)))
    trainer = fit(
        stage,
        module,
        stage.data(bundle, source, prepared),
        trainer_factory(config),
        label=config.method.name,
        folder=folder,
        seed=config.seed,
        loggers=_loggers(config, plain, folder),
        max_steps=config.trainer.max_steps,
        ckpt_path=checkpoint,
    )
    if not trainer.is_global_zero:
        return False
    _wait_for_children(trainer)
    bundle.model.cpu()
    provenance = {"data": type(source).__name__, "data_hash": prepared.data_hash, "parent": str(parent)}
    save_bundle(bundle, folder / "model", provenance)
    results["stored_bytes"] = stored_bytes(folder / "model")
    results["metrics"] = _scores(folder, source, prepared, trainer) | parent_scores(parent)
    draw_run(folder)
    return trainer.global_step == stage.max_steps


def _scores(folder: Path, source: DataSource, prepared: PreparedData, trainer: lightning.Trainer) -> dict[str, Any]:
    """Scores of the folder that was written, not of the model in memory: what is counted is what users load."""
    if "test" not in prepared.files:
        return {}
    exported = load_bundle(folder / "model")
    exported.model.to(trainer.strategy.root_device)
    scored = score(exported, source, prepared, "test", "test")
    with (folder / "predictions.jsonl").open("w") as file:
        file.writelines(json.dumps(item) + "\n" for item in scored.predictions)
    return scored.metrics


def _loggers(config: DictConfig, plain: dict[str, Any], folder: Path) -> list[Any]:
    if not config.logger or not _is_first_process():
        return []
    logger = instantiate(config.logger)(save_dir=folder, name=folder.name)
    logger.log_hyperparams(plain)
    return [logger]


def _checkpoint(config: DictConfig, plain: dict[str, Any], folder: Path) -> Path | None:
    """The checkpoint to continue from, checked to be this configuration's."""
    if config.ckpt_path is None:
        return None
    path = folder / "checkpoints" / "last.ckpt" if config.ckpt_path == "last" else Path(config.ckpt_path)
    if not path.is_file():
        raise UserError(
            f"ckpt_path={config.ckpt_path}: {path} does not exist. Run without ckpt_path to start from the beginning"
        )
    try:
        stored = torch.load(path, weights_only=True, mmap=True, map_location="cpu")["ders_identity"]
    except Exception as error:
        raise UserError(f"ckpt_path={path}: not a readable checkpoint of ders: {error}") from error
    differing = differences(stored, identity(plain))
    if differing:
        raise UserError(
            f"ckpt_path={path} belongs to another configuration (there → here):\n  "
            + "\n  ".join(differing[:10])
            + "\nUse the same dials, or start without ckpt_path"
        )
    return path


def _prepare_folder(folder: Path, plain: dict[str, Any], *, resume: bool) -> None:
    """An earlier attempt's files move aside when this one starts from the beginning: nothing is lost by a slip."""
    if not resume and folder.exists() and any(folder.iterdir()):
        previous = folder / "previous"
        shutil.rmtree(previous, ignore_errors=True)
        entries = [entry for entry in folder.iterdir() if entry != previous]
        previous.mkdir()
        for entry in entries:
            entry.rename(previous / entry.name)
        if (previous / "checkpoints" / "last.ckpt").exists() and not _finished(previous):
            log.warning("starting over; the unfinished attempt is kept in %s (ckpt_path=last continues one)", previous)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))


def _finished(folder: Path) -> bool:
    file = folder / "record.json"
    return file.exists() and read_record(file)["status"] == "finished"


def _is_first_process() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0


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
        yield
    finally:
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)


def _wait_for_children(trainer: lightning.Trainer) -> None:
    for process in getattr(trainer.strategy.launcher, "procs", None) or []:
        process.wait()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
