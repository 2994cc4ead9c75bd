"""Rows in LLaVA's JSON layout, checked before anyone pays for a training step."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

IMAGE_TAG = "<image>"
CLOSED = ("yes", "no")
# Larger pictures are taken for decompression bombs.
MAX_PIXELS = 89_478_485
_SHOWN = 10


class DataError(ValueError):
    """A data set that cannot be trained on; the message lists what is wrong with which rows."""


def read_rows(file: Path, image_root: Path | None) -> Dataset:
    """Read a LLaVA JSON file: rows of `id`, `image` (optional) and `conversations` (human and gpt in turn).

    Columns of the result: `id`, `image` (path below the image root, or None), `questions`, `answers` and `kinds` (one
    entry per turn each). A row may name a kind per turn in `kinds`, written `like_this`; else yes/no
    answers are `closed`, others `open`.

    Raises:
        DataError: the file is missing or not JSON; rows are broken; images are missing, unreadable, outside the image
            root or too large. All problems are found in one pass.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file. Set data.{file.stem} to a JSON file in LLaVA's layout")
    try:
        raw = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a JSON file: {error}") from error
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{file}: expected a non-empty list of rows in LLaVA's layout")
    problems: list[str] = []
    rows = []
    checked: dict[str, str | None] = {}
    for index, entry in enumerate(raw):
        try:
            row = _parse(entry)
            image = row["image"]
            if image is not None:
                if image not in checked:
                    checked[image] = _image_problem(image, image_root)
                if (problem := checked[image]) is not None:
                    raise ValueError(problem)
            rows.append(row)
        except ValueError as error:
            name = entry.get("id", "no id") if isinstance(entry, dict) else "no id"
            problems.append(f"row {index} ({name}): {error}")
    if problems:
        more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listed = "\n  ".join(problems[:_SHOWN])
        raise DataError(f"{file}: {len(problems)} of {len(raw)} rows cannot be used:\n  {listed}{more}")
    return Dataset.from_list(rows)


def _parse(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise ValueError("`conversations` must hold human and gpt turns in pairs")
    for turn, speaker in zip(turns, ["human", "gpt"] * (len(turns) // 2), strict=True):
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise ValueError("`conversations` must alternate {from: human, value: …} and {from: gpt, value: …}")
    questions = [turn["value"] for turn in turns[::2]]
    answers = [turn["value"] for turn in turns[1::2]]
    image = entry.get("image")
    if image is not None and not isinstance(image, str):
        raise ValueError("`image` must be a path below the image root")
    tags = sum(question.count(IMAGE_TAG) for question in questions)
    if tags != (image is not None):
        raise ValueError(f"{tags} {IMAGE_TAG} tags in the questions, but {'an' if image else 'no'} image")
    if any(IMAGE_TAG in answer for answer in answers):
        raise ValueError(f"an answer holds {IMAGE_TAG}")
    kinds = entry.get("kinds") or ["closed" if answer.strip().lower() in CLOSED else "open" for answer in answers]
    kinds = [re.sub(r"[^a-z0-9]+", "_", str(kind).lower()).strip("_") for kind in kinds]
    if len(kinds) != len(answers) or not all(kinds):
        raise ValueError("`kinds` must hold one kind per turn, of letters and digits")
    return {
        "id": str(entry.get("id", "")),
        "image": image,
        "questions": questions,
        "answers": answers,
        "kinds": kinds,
    }


def resolve_image(image: str, image_root: Path) -> Path:
    """The absolute path of a row's image.

    Raises:
        ValueError: the path leaves the image root, symbolic links followed.
    """
    root = image_root.resolve()
    path = (root / image).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{image}: the path leaves the image root {root}")
    return path


def open_image(path: Path) -> Image.Image:
    """A decoded RGB picture; refuses decompression bombs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels")
            return image.convert("RGB")


def _image_problem(image: str, image_root: Path | None) -> str | None:
    if image_root is None:
        return "has an image, but data.images (the image root) is not set"
    try:
        path = resolve_image(image, image_root)
        if not path.is_file():
            return f"{image}: missing below {image_root}"
        open_image(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return f"{image}: refused as a decompression bomb ({error})"
    except (OSError, SyntaxError) as error:
        return f"{image}: unreadable ({error})"
    except ValueError as error:
        return str(error)
    return None
