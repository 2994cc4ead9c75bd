"""From a configuration to objects, with every check that needs no data and no weights made first."""

from pathlib import Path
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from ders.cli.app import UserError, to_plain
from ders.data import DataSource
from ders.models.bundle import read_config
from ders.models.tiny import dense_from_config
from ders.training.batches import StepBatches
from ders.upcycling import UpcyclingSummary, set_trainable, upcycle

_ALLOWED = ("ders.", "torch.optim.", "lightning.")


def instantiate(node: Any) -> Any:
    """`hydra.utils.instantiate`, for targets of this package and the libraries it names only."""
    for target in _targets(OmegaConf.to_container(node, resolve=True)):
        if not target.startswith(_ALLOWED):
            raise UserError(f"_target_ {target} is not allowed: it must begin with {' or '.join(_ALLOWED)}")
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise UserError(str(error.__cause__ or error)) from error


def _targets(data: Any) -> list[str]:
    if isinstance(data, dict):
        own = [str(data["_target_"])] if "_target_" in data else []
        return own + [t for value in data.values() for t in _targets(value)]
    return [t for value in data for t in _targets(value)] if isinstance(data, list) else []


def trainer_factory(config: DictConfig) -> Any:
    """Partial of the configured trainer. Its own `max_steps` is a limit that `fit` takes, not the stage's length."""
    return instantiate(OmegaConf.create({k: v for k, v in to_plain(config.trainer).items() if k != "max_steps"}))


def parent_trainer_factory(config: DictConfig) -> Any:
    """Partial of the trainer of a parent: one process in fp32 without limits, whatever the run itself uses, for one
    parent serves all."""
    shared = {key: config.trainer[key] for key in ("_target_", "_partial_", "accelerator", "log_every_n_steps")}
    return instantiate(OmegaConf.create({**shared, "devices": 1, "precision": "32-true"}))


def upcycle_by_config(model: torch.nn.Module, config: DictConfig) -> UpcyclingSummary | None:
    """Do to a dense model what the method says; None for the dense control."""
    if config.upcycling is None:
        return None
    return upcycle(
        model, delta=instantiate(config.method).get("delta"), seed=config.seed, **instantiate(config.upcycling)
    )


def check(config: DictConfig) -> None:
    """Refuse what cannot work, before data is read or a weight is loaded.

    The whole model is built and upcycled on the meta device, where only shapes exist, so this is the very code that
    runs later.
    """
    source: DataSource = instantiate(config.data)
    if config.parent is not None:
        parent_config = read_config(Path(config.parent))
        has_images = hasattr(parent_config, "vision_config")
        model = dense_from_config(parent_config)
        name = f"parent={config.parent}"
    else:
        recipe = instantiate(config.model)
        has_images, name = recipe.has_images, "this model"
        with torch.device("meta"):
            model = recipe.dense()
    if source.image_size is not None and not has_images:
        raise UserError(
            f"{name} reads only text, and the data has images of {source.image_size} px: choose a model with a vision "
            "tower, or text-only data (data=digits_text)"
        )
    if config.scale != "tiny":
        raise UserError(f"scale={config.scale}: the configured model has one size, tiny")
    upcycle_by_config(model, config)
    set_trainable(model, config.trainable)
    for stage in config.stage.values():
        instantiate(stage)
    _check_devices(config)


def _check_devices(config: DictConfig) -> None:
    trainer, stage = config.trainer, config.stage.moe
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: torch sees no GPU here. Use trainer=cpu, or a CUDA build of torch")
    if isinstance(trainer.devices, int):
        world_size = trainer.devices * trainer.num_nodes
        StepBatches(1, stage.global_batch_size, 1, accumulate=stage.accumulate, world_size=world_size)
