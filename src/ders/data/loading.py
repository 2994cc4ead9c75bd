"""Torch data sets over LLaVA rows, and the collators that pad them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as Rows
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from ders.data.conversation import IGNORED, Encoder
from ders.data.rows import IMAGE_TAG, DataError, open_image, resolve_image

# Small sets are read many times: keep what fits.
_CACHED_BYTES = 256 * 2**20
_CACHED_ROWS = 20_000


class PixelReader:
    """Pixel values (C, H, W) of an image below a root, as the model's image processor makes them."""

    def __init__(self, image_root: Path | None, process: Callable[[Image], Tensor] | None) -> None:
        self.image_root, self.process = image_root, process
        self.kept: dict[str, Tensor] = {}
        self.room = _CACHED_BYTES

    def read(self, image: str) -> Tensor:
        if image in self.kept:
            return self.kept[image]
        pixels = self._decode(image)
        self.room -= pixels.numel() * pixels.element_size()
        if self.room >= 0:
            self.kept[image] = pixels
        return pixels

    def _decode(self, image: str) -> Tensor:
        if self.process is None or self.image_root is None:
            raise DataError(
                f"the data has images ({image}), but this model reads only text: choose a model with a vision tower, "
                "or text-only data"
            )
        return self.process(open_image(resolve_image(image, self.image_root)))


class Conversations(Dataset[dict[str, Any]]):
    """Whole conversations, for training: ids, labels and pixel values (or None)."""

    def __init__(self, rows: Rows, encoder: Encoder, pixels: PixelReader) -> None:
        self.rows, self.encoder, self.pixels = rows, encoder, pixels
        self.encode = functools.lru_cache(maxsize=_CACHED_ROWS)(self._encode)

    def __len__(self) -> int:
        return len(self.rows)

    def _encode(self, index: int) -> tuple[str | None, list[int], list[int]]:
        row = self.rows[index]
        return row["image"], *self.encoder.conversation(row["questions"], row["answers"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, ids, labels = self.encode(int(index))
        return {"ids": ids, "labels": labels, "pixels": None if image is None else self.pixels.read(image)}


class Questions(Dataset[dict[str, Any]]):
    """Single questions with their reference answers, for evaluation: each turn alone, so no answer leaks."""

    def __init__(self, rows: Rows, encoder: Encoder, pixels: PixelReader) -> None:
        self.encoder, self.pixels = encoder, pixels
        self.items = [item for row in rows for item in single_questions(row)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        pixels = None if item["image"] is None else self.pixels.read(item["image"])
        return {**item, "ids": self.encoder.prompt(item["question"]), "pixels": pixels}


def single_questions(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One item per turn of a row; the image goes with every question."""
    tag = f"{IMAGE_TAG}\n" if row["image"] is not None else ""
    bare = [question.replace(f"{IMAGE_TAG}\n", "").replace(IMAGE_TAG, "") for question in row["questions"]]
    return [
        {"id": row["id"], "image": row["image"], "question": tag + question, "answer": answer, "kind": kind}
        for question, answer, kind in zip(bare, row["answers"], row["kinds"], strict=True)
    ]


def pad(sequences: list[list[int]], value: int, *, left: bool = False) -> Tensor:
    """(B, S) of int64, padded to the longest."""
    length = max(map(len, sequences))
    rows = [[value] * (length - len(s)) + s if left else s + [value] * (length - len(s)) for s in sequences]
    return torch.tensor(rows, dtype=torch.int64)


def _model_inputs(items: list[dict[str, Any]], pad_id: int, *, left: bool) -> dict[str, Tensor]:
    inputs = {
        "input_ids": pad([item["ids"] for item in items], pad_id, left=left),
        "attention_mask": pad([[1] * len(item["ids"]) for item in items], 0, left=left),
    }
    pixels = [item["pixels"] for item in items if item["pixels"] is not None]
    if pixels:  # rows without an image simply have none: the model matches pixels with image tokens in order
        inputs["pixel_values"] = torch.stack(pixels)
    return inputs


def collate_conversations(items: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """A training batch, padded on the right."""
    return {
        **_model_inputs(items, pad_id, left=False),
        "labels": pad([item["labels"] for item in items], IGNORED),
    }


def collate_questions(items: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """An evaluation batch, padded on the left for generation; `items` go along."""
    return {"inputs": _model_inputs(items, pad_id, left=True), "items": items}
