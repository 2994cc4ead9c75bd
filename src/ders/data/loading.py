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
from ders.data.faults import DataError, RowError
from ders.data.images import read_image
from ders.data.rows import IMAGE_TAG

# Small sets are read many times: keep what fits.
_CACHED_BYTES = 256 * 2**20
_CACHED_ROWS = 20_000


class PixelReader:
    """Pixel values (C, H, W) of an image below a root, as the model's image processor makes them."""

    def __init__(self, image_root: Path | None, process: Callable[[Image], Tensor] | None) -> None:
        self.image_root, self.process = image_root, process
        self.kept: dict[str, Tensor] = {}
        self.room = _CACHED_BYTES

    def read(self, image: str, row: str = "") -> Tensor:
        """Pixel values of an image; `row` says whose it is, in case it cannot be read.

        Raises:
            DataError: the image cannot be read, or the model reads only text.
        """
        if image in self.kept:
            return self.kept[image]
        pixels = self._decode(image, row)
        self.room -= pixels.numel() * pixels.element_size()
        if self.room >= 0:
            self.kept[image] = pixels
        return pixels

    def _decode(self, image: str, row: str) -> Tensor:
        if self.process is None or self.image_root is None:
            raise DataError(
                f"the data has images ({image}), but this model reads only text: choose a model with a vision tower, "
                "or text-only data"
            )
        try:
            return self.process(read_image(image, self.image_root))
        except RowError as fault:
            raise DataError(f"{row}{': ' if row else ''}{fault}") from fault


class Conversations(Dataset[dict[str, Any]]):
    """Whole conversations, for training: ids, labels and pixel values (or None)."""

    def __init__(self, rows: Rows, encoder: Encoder, pixels: PixelReader) -> None:
        self.rows, self.encoder, self.pixels = rows, encoder, pixels
        self.encode = functools.lru_cache(maxsize=_CACHED_ROWS)(self._encode)

    def __len__(self) -> int:
        return len(self.rows)

    def _encode(self, index: int) -> tuple[str, str | None, list[int], list[int]]:
        row = self.rows[index]
        return f"row {index} ({row['id']})", row["image"], *self.encoder.conversation(row["questions"], row["answers"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, image, ids, labels = self.encode(int(index))
        pixels = None if image is None else self.pixels.read(image, name)
        return {"ids": ids, "labels": labels, "pixels": pixels}


class Questions(Dataset[dict[str, Any]]):
    """Single questions with their reference answers, for evaluation: each turn alone, so no answer leaks."""

    def __init__(self, rows: Rows, encoder: Encoder, pixels: PixelReader) -> None:
        self.encoder, self.pixels = encoder, pixels
        self.items = [item for row in rows for item in single_questions(row)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        pixels = None if item["image"] is None else self.pixels.read(item["image"], f"row {item['id']}")
        return {**item, "ids": self.encoder.prompt(item["question"]), "pixels": pixels}


def single_questions(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One item per turn of a row; the image goes with every question."""
    tag = f"{IMAGE_TAG}\n" if row["image"] is not None else ""
    annotations = row.get("annotations") or [[]] * len(row["answers"])
    turns = zip(row["questions"], row["answers"], row["kinds"], annotations, strict=True)
    return [
        {"id": row["id"], "image": row["image"], "question": tag + _bare(question), "answer": answer, "kind": kind}
        | ({"annotations": told} if told else {})
        for question, answer, kind, told in turns
    ]


def _bare(question: str) -> str:
    # The tag may stand before the question (LLaVA) or after it (LLaVA-Med).
    return question.replace(f"{IMAGE_TAG}\n", "").replace(f"\n{IMAGE_TAG}", "").replace(IMAGE_TAG, "")


def sample_lengths(rows: Rows) -> list[tuple[bool, int]]:
    """(has an image, words of all turns) of every row, without a tokenizer: what batches of like rows are made by.

    Rows are read column by column, 10,000 at a time.
    """
    lengths: list[tuple[bool, int]] = []
    for batch in rows.select_columns(["image", "questions", "answers"]).iter(batch_size=10_000):
        for image, questions, answers in zip(batch["image"], batch["questions"], batch["answers"], strict=True):
            lengths.append((image is not None, sum(len(text.split()) for text in (*questions, *answers))))
    return lengths


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
