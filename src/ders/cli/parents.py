"""The dense parent of a run: a given folder, or the tiny one, trained on first need and kept."""

import gc
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

import ders
from ders.cli.app import to_plain
from ders.cli.build import parent_trainer_factory
from ders.cli.instantiation import instantiate
from ders.data import DataSource, PreparedData
from ders.data.source import building
from ders.evaluation.scoring import score
from ders.models.bundle import ModelBundle, save_bundle
from ders.reporting.identity import digest
from ders.training import Stage
from ders.training.fit import fit, seed_everything

log = logging.getLogger(__name__)

STAGES = ("tower", "projector", "finetune")


def parent_recipe(config: DictConfig, data_hash: str) -> dict[str, Any]:
    """Everything the tiny parent depends on; the run's own method, stage and seed are not among it."""
    precision = {} if config.parent_precision == "32-true" else {"precision": config.parent_precision}
    return {
        **precision,
        "model": to_plain(config.model),
        "data": to_plain(config.data),
        "stages": {name: to_plain(config.stage[name]) for name in STAGES},
        "data_hash": data_hash,
        "version": ders.__version__,
        "parent_seed": config.parent_seed,
    }


def parent_folder(config: DictConfig, source: DataSource, prepared: PreparedData, cache: Path) -> Path:
    """The folder of the dense parent, trained first if need be: by one process, while others wait."""
    if config.parent is not None:
        return Path(config.parent)
    recipe = parent_recipe(config, prepared.data_hash)
    folder = cache / "parents" / digest(recipe)
    with building(folder) as unfinished:
        if unfinished is not None:
            log.info("no dense parent of this configuration yet: training it")
            _train_parent(config, source, prepared, recipe, unfinished)
    return folder


def parent_scores(folder: Path) -> dict[str, Any]:
    """Test scores of a parent this package trained; empty for a folder from elsewhere."""
    file = folder / "parent.json"
    return json.loads(file.read_text())["metrics"] if file.exists() else {}


def _train_parent(
    config: DictConfig, source: DataSource, prepared: PreparedData, recipe: dict[str, Any], folder: Path
) -> None:
    started = time.perf_counter()
    stages = {name: instantiate(config.stage[name]) for name in (*STAGES, "moe")}
    for stage in stages.values():
        if stage.skip is None:
            prepared.split(stage.split)  # read and checked before the first stage has cost anything
    seed_everything(config.parent_seed)
    bundle = instantiate(config.model).build(prepared.texts())
    device = _train_stages(config, source, prepared, recipe, stages, bundle, folder)
    # What only training needed: it would lie beside all that scoring takes.
    bundle.model.zero_grad()
    gc.collect()
    save_bundle(bundle, folder / "model")
    for item in (folder / "model").iterdir():
        item.rename(folder / item.name)
    (folder / "model").rmdir()
    bundle.model.to(device)
    metrics = score(bundle, source, prepared, "test", "parent").metrics if "test" in prepared.files else {}
    seconds = time.perf_counter() - started
    (folder / "parent.json").write_text(
        json.dumps({"recipe": recipe, "metrics": metrics, "wall_seconds": seconds}, indent=1)
    )
    accuracy = metrics.get("parent/accuracy", {}).get("value")
    log.info("dense parent ready in %.0f s, test accuracy %s", seconds, accuracy)


def _train_stages(
    config: DictConfig,
    source: DataSource,
    prepared: PreparedData,
    recipe: dict[str, Any],
    stages: dict[str, Any],
    bundle: ModelBundle,
    folder: Path,
) -> torch.device:
    """Train what is not skipped, in place; returns where the model then is."""
    make_trainer = parent_trainer_factory(config)
    device = torch.device("cpu")
    for name in STAGES:
        stage: Stage = stages[name]
        reason = stage.skipped(bundle, prepared)
        if reason is not None:
            log.info("stage %s skipped: %s", name, reason)
            continue
        stage = stage.sized(prepared)
        module = stage.module(bundle, source, prepared, seed=config.parent_seed, identity=recipe)
        data = stage.data(bundle, source, prepared)
        logs = folder / "logs" / name
        trainer = fit(stage, module, data, make_trainer, label=name, folder=logs, seed=config.parent_seed)
        device = trainer.strategy.root_device
        if trainer.global_step != stage.steps:
            raise RuntimeError(f"stage {name} of the parent stopped at step {trainer.global_step}: nothing is kept")
    return device
