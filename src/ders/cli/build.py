"""From a configuration to objects, with every check that needs no data and no weights made first."""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ders.cli.app import UserError, to_plain
from ders.cli.instantiation import instantiate
from ders.data import DataSource
from ders.models.bundle import dense_from_config, read_config
from ders.moe import EXECUTIONS, set_execution
from ders.training.batches import StepBatches
from ders.upcycling import MOE_TRAINABLE, UpcyclingSummary, set_trainable, upcycle


def trainer_factory(config: DictConfig) -> Callable[..., Any]:
    """Makes the configured trainer. Its own `max_steps` is a limit that `fit` takes, not the stage's length."""
    node = OmegaConf.create({k: v for k, v in to_plain(config.trainer).items() if k != "max_steps"})
    # Instantiated at each call: a strategy belongs to one trainer.
    return lambda **others: instantiate(node)(**others)


def parent_trainer_factory(config: DictConfig) -> Any:
    """Partial of the trainer of a parent: one process in `parent_precision` without limits, whatever the run itself
    uses, for one parent serves all."""
    shared = {key: config.trainer[key] for key in ("_target_", "_partial_", "accelerator", "log_every_n_steps")}
    # torchrun's and Slurm's processes are not for it: each of theirs would refuse to be the only one.
    alone = [{"_target_": "lightning.fabric.plugins.environments.LightningEnvironment"}]
    precision = config.parent_precision
    return instantiate(OmegaConf.create({**shared, "devices": 1, "precision": precision, "plugins": alone}))


def method_callbacks(config: DictConfig) -> list[Any]:
    """What a method does while its stage runs, beside its deltas."""
    return list((instantiate(config.method).get("callbacks") or {}).values())


def upcycle_by_config(
    model: torch.nn.Module, config: DictConfig, gathered: Any = contextlib.nullcontext
) -> UpcyclingSummary | None:
    """Do to a dense model what the method says; None for the dense control. `gathered`: see `upcycle`."""
    if config.upcycling is None:
        return None
    options = instantiate(config.upcycling)
    if config.get("compression"):
        options["extended"] = False  # the dial is the compression's: what it compresses has full experts
    summary = upcycle(
        model, delta=instantiate(config.method).get("delta"), seed=config.seed, gathered=gathered, **options
    )
    set_execution(model, config.execution)
    return summary


def check(config: DictConfig) -> None:
    """Refuse what cannot work, before data is read or a weight is loaded.

    The whole model is built and upcycled on the meta device, where only shapes exist, so this is the very code that
    runs later.
    """
    _check_types(config)
    if config.method.name == "dense" and config.upcycling is not None:
        raise UserError("method=dense has no experts: drop upcycling=…, or choose a method that has")
    source: DataSource = instantiate(config.data)
    if config.parent is not None:
        parent_config = read_config(Path(config.parent))
        has_images = hasattr(parent_config, "vision_config")
        model = dense_from_config(parent_config)
        name = f"parent={config.parent}"
    else:
        recipe = instantiate(config.model)
        if config.scale not in recipe.sizes:
            raise UserError(f"scale={config.scale}: the configured model has one size, {' or '.join(recipe.sizes)}")
        recipe.verify()
        has_images, name = recipe.has_images, "this model"
        with torch.device("meta"):
            model = recipe.dense()
    if source.image_size is not None and not has_images:
        raise UserError(
            f"{name} reads only text, and the data has images of {source.image_size} px: choose a model with a vision "
            "tower, or text-only data (data=digits_text)"
        )
    _check_compression(config, model)
    upcycle_by_config(model, config)
    set_trainable(model, config.trainable)
    for name, node in config.stage.items():
        stage = instantiate(node)
        if config.scale == "paper" and stage.skip is None and stage.num_epochs is None:
            raise UserError(
                f"scale=paper: stage.{name} lasts {stage.max_steps} steps, which is a tiny recipe's: choose "
                f"recipe=general, medical or code, or set stage.{name}.num_epochs and stage.{name}.max_steps=null"
            )
        try:
            stage.schedule(stage.optimizer([torch.zeros(1, requires_grad=True)]), stage.max_steps or 1000)
        except (TypeError, ValueError) as error:
            raise UserError(f"stage.{name}: optimizer or schedule cannot be built: {error}") from error
    for node in (config.logger or {}).values():
        instantiate(node)(folder=Path(), name="")  # it starts with its first call, not here
    _check_devices(config)


def _check_compression(config: DictConfig, dense: torch.nn.Module) -> None:
    compression = config.get("compression")
    if not compression:
        return
    if config.method.name != "vanilla":
        raise UserError(
            f"compression={compression.name} takes the full experts of method=vanilla: got method={config.method.name}"
        )
    if config.ckpt_path is not None:
        raise UserError("ckpt_path continues a training: continue the vanilla run first, without compression=…")
    if config.extended and not config.upcycling.universal:
        raise UserError("extended=true needs a universal FFN: set upcycling.universal=true")
    if config.base not in ("parent", "mean"):
        read_config(Path(config.base))
    # The deltas are built on the meta device: every dial out of range is told now, not after the training.
    upcycle(copy.deepcopy(dense), delta=instantiate(compression)["delta"], **instantiate(config.upcycling))


PARENT_PRECISIONS = ("32-true", "bf16-mixed")
_WHOLE, _NUMBER = "a whole number", "a number"
_TYPES = {
    "num_experts": _WHOLE,
    "top_k": _WHOLE,
    "rank": _WHOLE,
    "neurons": _WHOLE,
    "bits": _WHOLE,
    "seed": _WHOLE,
    "parent_seed": _WHOLE,
} | {"sparsity": _NUMBER, "tilt": _NUMBER}


def _check_types(config: DictConfig) -> None:
    for dial, kind in _TYPES.items():
        value = config.get(dial, 0)
        if isinstance(value, bool) or not isinstance(value, int if kind == _WHOLE else int | float):
            raise UserError(f"{dial} must be {kind}: got {value!r}")
    if min(config.seed, config.parent_seed) < 0:
        raise UserError(f"seed and parent_seed must not be negative: got {config.seed} and {config.parent_seed}")
    if config.trainable not in MOE_TRAINABLE:
        raise UserError(f"trainable must be one of {', '.join(MOE_TRAINABLE)}: got {config.trainable!r}")
    if config.execution not in EXECUTIONS:
        raise UserError(f"execution must be one of {', '.join(EXECUTIONS)}: got {config.execution!r}")
    if config.export not in ("last", "best"):
        raise UserError(f"export must be last or best: got {config.export!r}")
    if not isinstance(config.keep_checkpoints, int) or config.keep_checkpoints < 1:
        raise UserError(f"keep_checkpoints must be a whole number from 1 on: got {config.keep_checkpoints!r}")
    if config.skip_spikes is not None and not (isinstance(config.skip_spikes, int | float) and config.skip_spikes > 1):
        raise UserError(f"skip_spikes must be a number above 1, or null: got {config.skip_spikes!r}")
    if config.parent_precision not in PARENT_PRECISIONS:
        raise UserError(
            f"parent_precision must be one of {', '.join(PARENT_PRECISIONS)}: got {config.parent_precision!r}"
        )
    limit = config.trainer.max_steps
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise UserError(f"trainer.max_steps must be a whole number from 1 on, or null for no limit: got {limit!r}")


def _check_devices(config: DictConfig) -> None:
    trainer, stage = config.trainer, config.stage.moe
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: torch sees no GPU here. Use trainer=cpu, or a CUDA build of torch")
    try:
        probe = trainer_factory(config)(
            logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=1
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"trainer: cannot be built: {error}") from error
    for callback in method_callbacks(config):
        try:
            callback.setup(probe, None, "fit")
        except ValueError as error:
            raise UserError(f"method={config.method.name}: {error}") from error
    if isinstance(trainer.devices, int):
        world_size = trainer.devices * trainer.num_nodes
        stage = instantiate(stage).on_devices(world_size)
        StepBatches(1, stage.global_batch_size, 1, accumulate=stage.accumulate, world_size=world_size)
