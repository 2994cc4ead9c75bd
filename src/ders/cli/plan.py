"""`python scripts/plan.py`: what a model will cost, from its shapes on the meta device."""

import json
import math
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig

from ders.accounting import count_parameters
from ders.accounting.budget import dial_of
from ders.accounting.costs import decode_bytes, flops_per_token
from ders.accounting.memory import STAGES, TrainedParams, activation_bytes, model_state_bytes
from ders.cli.app import UserError, check_format, launch
from ders.cli.plan_models import DTYPES, PlannedModel, PlannedModels
from ders.cli.plan_table import print_table
from ders.upcycling import MOE_TRAINABLE, set_trainable

_WHOLE = {"seed": 0, "gpus": 1, "tokens_per_gpu": 1, "batch": 1, "num_experts": 1, "top_k": 1, "rank": 1, "bits": 1}
_ABOUT = ("trainable", "train_rest", "dtype", "scale", "gpus", "tokens_per_gpu", "batch", "budget_gib")


def main() -> None:
    launch(run, "plan")


def run(config: DictConfig) -> None:
    """Count one model, beside its dense parent and its vanilla form, and print that."""
    result = plan(config)
    if config.format == "json":
        print(json.dumps(result))
    else:
        print_table(result)


def plan(config: DictConfig) -> dict[str, Any]:
    """All numbers as plain data: the chosen model's at the top, every column with its model states under `columns`.

    `setting` is the dial that `budget_gib` has set.
    """
    _check(config)
    models = PlannedModels(config)
    columns, delta = models.columns()
    *_, chosen = columns
    counted = {name: _column(config, planned, name == chosen) for name, planned in columns.items()}
    found = delta is not None and config.budget_gib is not None
    return {
        "model": config.model.get("name") or type(models.dense).__name__,
        "method": config.method.name,
        "compression": models.compression.name if models.compression else None,
        **{key: config[key] for key in _ABOUT},
        "setting": {dial_of(delta): delta.keywords[dial_of(delta)]} if found else {},
        **{key: value for key, value in counted[chosen].items() if key != "state_bytes"},
        "columns": counted,
    }


def _column(config: DictConfig, planned: PlannedModel, chosen: bool) -> dict[str, Any]:
    counts = asdict(count_parameters(planned.model))
    states: dict[str, Any] | None = None
    try:
        counts["trainable_params"] = set_trainable(planned.trained, config.trainable, rest=config.train_rest)
        states = _states(TrainedParams.of(planned.trained), config.gpus)
    except ValueError:  # beside the chosen model stand some that this choice is not for
        if chosen:
            raise
        counts["trainable_params"] = None
    return {
        **counts,
        "stored_bytes": planned.stored_bytes,
        "activation_bytes": activation_bytes(planned.trained, config.tokens_per_gpu),
        "decode_bytes_per_token": decode_bytes(planned.model, config.batch),
        "flops_per_token": flops_per_token(planned.model),
        "state_bytes": states or {},
    }


def _states(params: TrainedParams, gpus: int) -> dict[str, Any]:
    """Model states by strategy: bytes of one GPU and of the node's CPU."""
    found = {}
    for stage in STAGES:
        for offload in (False, True) if stage else (False,):
            name = f"zero_{stage}" if stage else "ddp"
            states = model_state_bytes(params, stage=stage, num_gpus=gpus, offload=offload)
            found[f"{name}_offload" if offload else name] = asdict(states)
    return found


def _check(config: DictConfig) -> None:
    check_format(config.format)
    for dial, least in _WHOLE.items():
        value = config.get(dial, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{dial} must be a whole number from {least} on: got {value!r}")
    for dial in ("sparsity", "budget_gib"):
        value = config.get(dial)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise UserError(f"{dial} must be a number, not negative: got {value!r}")
    if config.budget_gib is not None and not math.isfinite(config.budget_gib):
        raise UserError(f"budget_gib must be a finite number: got {config.budget_gib}")
    if config.trainable not in MOE_TRAINABLE:
        raise UserError(f"trainable must be one of {', '.join(MOE_TRAINABLE)}: got {config.trainable!r}")
    if config.method.name == "dense" and config.upcycling is not None:
        raise UserError("method=dense has no experts: drop upcycling=…, or choose a method that has")
    if config.dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}: got {config.dtype!r}")
    compression = config.get("compression")
    if compression and config.method.name != "vanilla":
        raise UserError(
            f"compression={compression.name} takes the full experts of method=vanilla: got method={config.method.name}"
        )
    if config.budget_gib is not None and not (compression or config.method.delta):
        raise UserError(
            "budget_gib looks for a setting of sparsity, bits or rank: choose method=ders_sm, method=ders_lm, or "
            "method=vanilla with a compression"
        )
