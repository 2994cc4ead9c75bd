"""The models of a plan, on the meta device: the dense one, its vanilla form, and the one that is asked for."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ders.accounting.budget import delta_bytes, mildest
from ders.accounting.formula import Architecture
from ders.cli.app import UserError
from ders.cli.instantiation import instantiate
from ders.deltas import Delta
from ders.models.planning import planned_bytes, planned_compressed_bytes
from ders.upcycling import upcycle

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class PlannedModel:
    """One column of a plan.

    Attributes:
        trained: the model that is trained to get it: another one where this one is compressed afterwards.
        stored_bytes: of its weight files.
    """

    model: nn.Module
    trained: nn.Module
    stored_bytes: int


class PlannedModels:
    """What a configuration makes of its dense model, each form from a copy of that."""

    def __init__(self, config: DictConfig) -> None:
        self.config, self.compression = config, config.get("compression")
        self.dense = _dense(config)
        options = {} if config.upcycling is None else instantiate(config.upcycling)
        # The universal FFN is a delta too where there are deltas, never in the vanilla form.
        self.extended = bool(options.pop("extended", False) or config.get("extended", False))
        options.pop("router_weights", None)  # trained beforehand, of the same shapes
        self._options = options

    def vanilla(self) -> nn.Module:
        return self._upcycled()

    def columns(self) -> tuple[dict[str, PlannedModel], Callable[..., Delta] | None]:
        """All columns by name, the chosen one last, and its delta where it has one."""
        found = {"dense": PlannedModel(self.dense, self.dense, planned_bytes(self.dense))}
        if self.config.upcycling is None:
            return found, None
        full = self.vanilla()
        found["vanilla"] = PlannedModel(full, full, planned_bytes(full))
        delta = instantiate(self.compression or self.config.method).get("delta")
        if delta is None:
            if self.extended:
                self._upcycled(extended=True)  # refused, in the words of `upcycle`
            return found, None
        if self.config.budget_gib is not None:
            delta = self._within(self.config.budget_gib, full, delta)
        name = f"vanilla + {self.compression.name}" if self.compression else self.config.method.name
        found[name] = self._with_delta(full, delta)
        return found, delta

    def _upcycled(self, **options: Any) -> nn.Module:
        model = copy.deepcopy(self.dense)
        upcycle(model, seed=self.config.seed, **self._options, **options)
        return model

    def _with_delta(self, full: nn.Module, delta: Callable[..., Delta]) -> PlannedModel:
        model = self._upcycled(delta=delta, extended=self.extended)
        if self.compression:
            stored = planned_compressed_bytes(full, delta=delta, extended=self.extended)
            return PlannedModel(model, full, stored)
        return PlannedModel(model, model, planned_bytes(model))

    def _within(self, gib: float, full: nn.Module, delta: functools.partial[Delta]) -> functools.partial[Delta]:
        """The delta at the mildest setting whose model fits."""
        self._upcycled(delta=delta, extended=self.extended)  # a dial out of range is told in the words of the delta
        shape, dtype = Architecture.of(full), DTYPES[self.config.dtype]

        def deltas(one: Callable[..., Delta]) -> int:
            return shape.num_layers * delta_bytes(one, shape.num_experts + self.extended, shape.matrices, dtype)

        def exact(one: Callable[..., Delta]) -> int:
            return self._with_delta(full, one).stored_bytes

        try:
            # All but the deltas is the same for every setting, up to a few digits of the headers.
            rest = exact(delta) - deltas(delta)
            return mildest(delta, shape.matrices, lambda one: rest + deltas(one), exact, int(gib * 2**30))
        except ValueError as error:
            raise UserError(f"budget_gib={gib}: {error}") from error


def _dense(config: DictConfig) -> nn.Module:
    recipe = instantiate(config.model)
    if config.scale not in recipe.sizes:
        raise UserError(f"scale={config.scale}: this model has one size: set scale={' or scale='.join(recipe.sizes)}")
    with torch.device("meta"):
        model: nn.Module = recipe.dense()
    return model.to(DTYPES[config.dtype])
