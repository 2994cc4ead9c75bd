"""Stages of a recipe: what trains, on what, for how long.

Tower, projector, dense fine-tune and MoE are configurations of two classes; a stage that does not apply to a model
(there is no tower to teach, no projector to align) says why and is skipped.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ders.data import DataSource, PreparedData
from ders.data.loading import (
    Conversations,
    PixelReader,
    Questions,
    collate_conversations,
    collate_questions,
    sample_lengths,
)
from ders.data.rows import DataError
from ders.models.bundle import ModelBundle
from ders.training.modules import LanguageModule, StageModule, TowerModule
from ders.upcycling import set_trainable

_WHOLE_NUMBERS = (
    "max_steps",
    "num_epochs",
    "global_batch_size",
    "accumulate",
    "device_batch_size",
    "validate_every",
    "save_every",
)


@dataclass(frozen=True)
class StageData:
    """Data sets and collators of one stage.

    `lengths`, where batches are grouped by them: of each training row, whether it has an image and how long it is.
    """

    train: Dataset[Any]
    collate: Callable[[list[Any]], Any]
    lengths: list[tuple[bool, int]] | None = None
    validation: Dataset[Any] | None = None
    collate_validation: Callable[[list[Any]], Any] | None = None
    validation_batch_size: int = 64
    validation_by_loss: Dataset[Any] | None = None

    @property
    def validates(self) -> bool:
        return self.validation is not None or self.validation_by_loss is not None

    def validation_loader(self, rank: int, world_size: int, *, by_loss: bool = False) -> DataLoader[Any] | None:
        """Rows of one process.

        Args:
            by_loss: with the answers to be expected, like training rows, and as many on every process: the first rows
                again on those that would have one less.
        """
        rows = self.validation_by_loss if by_loss else self.validation
        if rows is None:
            return None
        num_rows = len(rows)  # type: ignore[arg-type]
        end = math.ceil(num_rows / world_size) * world_size if by_loss else num_rows
        return DataLoader(
            rows,
            batch_size=self.validation_batch_size,
            sampler=[row % num_rows for row in range(rank, end, world_size)],
            collate_fn=self.collate if by_loss else self.collate_validation,
        )


@dataclass(kw_only=True)
class Stage:
    """What every stage states.

    Attributes:
        trainable: a row of `ders.upcycling.TRAINABLE`.
        max_steps: optimizer steps; None where `num_epochs` says how long.
        num_epochs: passes over the split instead.
        global_batch_size: rows of one optimizer step, whatever the number of devices.
        accumulate: micro-batches a step is split into.
        device_batch_size: rows of a micro-batch instead: `accumulate` follows from it and the number of devices.
        num_workers: processes that read images ahead of training; 0 for none.
        data_timeout: seconds to wait for one of them before the job ends with an error.
        split: of the data, on which this stage trains.
        skip: why this stage has nothing to do in a recipe; None where it has.
        optimizer: partial of a torch optimizer.
        schedule: partial of `ders.training.schedule`.
        gradient_clip: largest gradient norm; None for no limit.
        validate_every, save_every: optimizer steps between validations and between checkpoints; None for never.
    """

    trainable: str
    global_batch_size: int
    optimizer: Callable[..., Any]
    schedule: Callable[..., Any]
    max_steps: int | None = None
    num_epochs: int | None = None
    accumulate: int = 1
    device_batch_size: int | None = None
    num_workers: int = 0
    data_timeout: float = 300
    split: str = "train"
    skip: str | None = None
    gradient_clip: float | None = 1.0
    validate_every: int | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name in _WHOLE_NUMBERS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} of a stage must be a whole number from 1 on: got {value!r}")
        if (self.max_steps is None) == (self.num_epochs is None):
            raise ValueError("a stage lasts max_steps optimizer steps or num_epochs epochs: set one of them")

    @property
    def steps(self) -> int:
        """Optimizer steps, of a stage that is `sized`."""
        assert self.max_steps is not None
        return self.max_steps

    def sized(self, prepared: PreparedData) -> Self:
        """This stage with its length in optimizer steps; the last one of its epochs may reach into another."""
        if self.num_epochs is None:
            return self
        steps = math.ceil(self.num_epochs * len(prepared.split(self.split)) / self.global_batch_size)
        return dataclasses.replace(self, max_steps=steps, num_epochs=None)

    def on_devices(self, world_size: int) -> Self:
        """This stage with micro-batches of at most `device_batch_size` rows on each of `world_size` devices.

        Raises:
            ValueError: the global batch cannot be split so.
        """
        if self.device_batch_size is None:
            return self
        at_once = self.device_batch_size * world_size
        if self.global_batch_size % at_once and at_once % self.global_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} cannot be split into micro-batches of "
                f"{self.device_batch_size} rows on {world_size} devices: choose a device_batch_size that divides "
                f"{self.global_batch_size / world_size:g}"
            )
        accumulate = max(self.global_batch_size // at_once, 1)
        return dataclasses.replace(self, accumulate=accumulate, device_batch_size=None)

    def skipped(self, bundle: ModelBundle, prepared: PreparedData) -> str | None:
        """Why this stage has nothing to do for a model and its data, or None."""
        return self.skip

    def data(self, bundle: ModelBundle, source: DataSource, prepared: PreparedData) -> StageData:
        raise NotImplementedError

    def module(self, bundle: ModelBundle, source: DataSource, prepared: PreparedData, **how: Any) -> StageModule:
        """The Lightning module; sets what is trainable.

        Args:
            how: of `StageModule`: `seed`, `identity`, and what it takes besides.
        """
        raise NotImplementedError

    def _shared(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "num_steps": self.steps,
        }


@dataclass(kw_only=True)
class LanguageStage(Stage):
    """A stage that trains on conversations.

    Attributes:
        router_loss_coef: multiplies the sum of the routers' losses.
        train_rest: also what the language model has beside its FFNs, as the paper's code recipe does.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        group_by_modality_length: batches of rows that all have an image, or all have none, and are of like length.
    """

    router_loss_coef: float = 0.01
    train_rest: bool = False
    gradient_checkpointing: bool = False
    group_by_modality_length: bool = False

    def skipped(self, bundle: ModelBundle, prepared: PreparedData) -> str | None:
        if self.trainable == "projector" and bundle.image_processor is None:
            return "this model has no projector"
        return super().skipped(bundle, prepared)

    def data(self, bundle: ModelBundle, source: DataSource, prepared: PreparedData) -> StageData:
        rows = prepared.split(self.split)
        encoder, val_encoder = (
            source.encoder(bundle.tokenizer, bundle.image_tokens, split) for split in (self.split, "val")
        )
        pixels = PixelReader(prepared.image_root, bundle.pixel_reader)
        pad_id = bundle.tokenizer.pad_token_id
        validates = "val" in prepared.files and self.validate_every is not None
        generates = validates and source.scored_by == "answers"
        return StageData(
            train=Conversations(rows, encoder, pixels),
            lengths=sample_lengths(rows) if self.group_by_modality_length else None,
            collate=functools.partial(collate_conversations, pad_id=pad_id),
            validation=Questions(prepared.split("val"), val_encoder, pixels) if generates else None,
            collate_validation=functools.partial(collate_questions, pad_id=pad_id),
            validation_batch_size=source.eval_batch_size,
            validation_by_loss=Conversations(prepared.split("val"), val_encoder, pixels) if validates else None,
        )

    def module(self, bundle: ModelBundle, source: DataSource, prepared: PreparedData, **how: Any) -> LanguageModule:
        set_trainable(bundle.model, self.trainable, rest=self.train_rest)
        return LanguageModule(
            bundle,
            gradient_checkpointing=self.gradient_checkpointing,
            router_loss_coef=self.router_loss_coef,
            max_answer_tokens=source.max_answer_tokens,
            **self._shared(),
            **how,
        )


@dataclass(kw_only=True)
class TowerStage(Stage):
    """A stage that teaches a fresh vision tower the labels its data offers."""

    def skipped(self, bundle: ModelBundle, prepared: PreparedData) -> str | None:
        if bundle.image_processor is None:
            return "this model has no vision tower"
        if prepared.labels is None:
            return "this data offers no image labels"
        return super().skipped(bundle, prepared)

    def data(self, bundle: ModelBundle, source: DataSource, prepared: PreparedData) -> StageData:
        train, val = (LabelledImages(prepared, split, bundle) for split in ("train", "val"))
        return StageData(
            train=train,
            collate=collate_labelled,
            validation=val if self.validate_every is not None else None,
            collate_validation=collate_labelled,
            validation_batch_size=source.eval_batch_size,
        )

    def module(self, bundle: ModelBundle, source: DataSource, prepared: PreparedData, **how: Any) -> TowerModule:
        set_trainable(bundle.model, self.trainable)
        return TowerModule(bundle, num_classes=prepared.num_classes, **self._shared(), **how)


class LabelledImages(Dataset[tuple[Tensor, list[int]]]):
    """Pixel values and class ids, one per patch or one per image.

    Raises:
        DataError: there are neither as many labels as the model has patches, nor one.
    """

    def __init__(self, prepared: PreparedData, split: str, bundle: ModelBundle) -> None:
        self.items = list(prepared.image_labels(split).items())
        self.pixels = PixelReader(prepared.image_root, bundle.pixel_reader)
        config = bundle.model.config.vision_config
        num_patches = (config.image_size // config.patch_size) ** 2
        if len(self.items[0][1]) not in (1, num_patches):
            raise DataError(
                f"the data labels {len(self.items[0][1])} patches of an image, and this model's tower has "
                f"{num_patches}: set model.vision.patch_size to data.patch_size"
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, list[int]]:
        image, labels = self.items[index]
        return self.pixels.read(image), labels


def collate_labelled(items: list[tuple[Tensor, list[int]]]) -> dict[str, Tensor]:
    pixels, labels = zip(*items, strict=True)
    return {"pixel_values": torch.stack(pixels), "labels": torch.tensor(labels)}
