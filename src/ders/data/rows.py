"""Rows in LLaVA's JSON layout, checked before anyone pays for a training step."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets import List as Column

from ders.data.faults import DataError, FaultyRow, RowError, listed, next_step
from ders.data.images import inspect_image

log = logging.getLogger(__name__)

IMAGE_TAG = "<image>"
CLOSED = ("yes", "no")
SPEAKERS = ("human", "gpt")
# How medical sets write their two types of answers.
_ANSWER_TYPES = {"open": "open", "closed": "closed", "close": "closed", "yes/no": "closed"}
_TEXT = Value("string")
_FEATURES = Features(
    id=_TEXT,
    image=_TEXT,
    questions=Column(_TEXT),
    answers=Column(_TEXT),
    kinds=Column(_TEXT),
    annotations=Column(Column(_TEXT)),
)


@dataclass(frozen=True)
class Origin:
    """What a file's rows do not say of themselves.

    Attributes:
        benchmark: of which benchmark these questions are; their kind is then its name, with `_open` or `_closed` where
            rows have an `answer_type` and no `answers` of several people.
        folder: below the image root, where this file's image paths start.
    """

    benchmark: str | None = None
    folder: str = ""

    def place(self, image: str | None) -> str | None:
        """A row's image path as seen from the image root."""
        return f"{self.folder}/{image}" if self.folder and image is not None else image


def read_rows(
    file: Path,
    image_root: Path | None,
    *,
    check_images: bool = True,
    on_fault: str = "refuse",
    origin: Origin = Origin(),
) -> Dataset:
    """Read a LLaVA JSON file: rows of `id`, `image` (optional) and `conversations` (human and gpt in turn).

    Columns of the result: `id`, `image` (path below the image root, or None), `questions`, `answers`, `kinds` and
    `annotations` (one entry per turn each). A row may name a kind per turn in `kinds`, written `like_this`, or its
    `answer_type`; else yes/no answers are `closed`, others `open`. `annotations` are the answers of several people to
    one question, which VQA v2 and VizWiz give as `answers`: where there are any, `answer_type` names no kind.

    Args:
        check_images: decode every image. False: they are taken to be there, for reading hundreds of thousands takes
            hours.
        on_fault: refuse the file for a row that cannot be used, or skip such rows and log how many.

    Raises:
        DataError: the file is missing or not JSON; rows are broken; images are missing, unreadable, outside the image
            root or too large. All problems are found in one pass.
    """
    raw = raw_rows(file)
    checked: dict[str, RowError | None] = {}

    def image_fault(image: str) -> RowError | None:
        if image not in checked:
            checked[image] = inspect_image(image, image_root)[0]
        return checked[image]

    rows, faulty = sift(raw, origin, image_fault if check_images or image_root is None else lambda _: None)
    if faulty:
        told = f"{file}: {len(faulty)} of {len(raw)} rows cannot be used"
        if on_fault == "refuse" or not rows:
            raise DataError(f"{told}:{listed(faulty)}\n{next_step(on_fault)}")
        log.warning("%s and are skipped:%s", told, listed(faulty))
    return Dataset.from_list(rows, features=_FEATURES)


def raw_rows(file: Path) -> list[Any]:
    """The entries of a JSON list, or of a file with one JSON value a line.

    Raises:
        DataError: the file is missing, empty or not JSON.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file. Set data.{file.stem} to a JSON file in LLaVA's layout")
    try:
        text = file.read_text()
        raw = [json.loads(line) for line in text.split("\n") if line.strip()] if file.suffix == ".jsonl" else None
        raw = json.loads(text) if raw is None else raw
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a JSON file: {error}") from error
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{file}: expected a non-empty list of rows in LLaVA's layout")
    return raw


def sift(
    raw: list[Any], origin: Origin, image_fault: Callable[[str], RowError | None]
) -> tuple[list[dict[str, Any]], list[FaultyRow]]:
    """Parsed rows, and those that cannot be used."""
    rows, faulty = [], []
    for index, entry in enumerate(raw):
        try:
            row = parse(entry, origin)
            if row["image"] is not None and (fault := image_fault(row["image"])) is not None:
                raise fault
            rows.append(row)
        except RowError as fault:
            name = entry.get("id", "no id") if isinstance(entry, dict) else "no id"
            faulty.append(FaultyRow(index, str(name), fault.kind, str(fault)))
    return rows, faulty


def parse(entry: Any, origin: Origin = Origin()) -> dict[str, Any]:
    """One row of a file as `read_rows` gives it, its image unseen.

    Raises:
        RowError: it cannot be used.
    """
    if not isinstance(entry, dict):
        raise RowError("not_an_object", "not an object")
    questions, answers = _turns(entry)
    image = entry.get("image")
    if image is not None and not isinstance(image, str):
        raise RowError("image_path", "`image` must be a path below the image root")
    tags = sum(question.count(IMAGE_TAG) for question in questions)
    if tags != (image is not None):
        kind = "tag_without_image" if image is None else "image_without_tag" if tags == 0 else "several_tags"
        raise RowError(kind, f"{tags} {IMAGE_TAG} tags in the questions, but {'an' if image else 'no'} image")
    return {
        "id": str(entry.get("id", "")),
        "image": origin.place(image),
        "questions": questions,
        "answers": answers,
        "kinds": _kinds(entry, answers, origin.benchmark),
        "annotations": _annotations(entry, answers),
    }


def _turns(entry: dict[str, Any]) -> tuple[list[str], list[str]]:
    # LLaVA-Med's test files misspell the name.
    turns = entry.get("conversations", entry.get("conversatons"))
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise RowError("turns", "`conversations` must hold human and gpt turns in pairs")
    for turn, speaker in zip(turns, SPEAKERS * (len(turns) // 2), strict=True):
        told = turn.get("from") if isinstance(turn, dict) else None
        if told is not None and told not in SPEAKERS:
            raise RowError("unknown_speaker", f"unknown speaker {told!r}: turns are from human and from gpt")
        if told != speaker or not isinstance(turn.get("value"), str):
            message = "`conversations` must alternate {from: human, value: …} and {from: gpt, value: …}"
            raise RowError("turns", message)
    answers = [turn["value"] for turn in turns[1::2]]
    for number, answer in enumerate(answers, start=1):
        if not answer.strip():
            raise RowError("empty_answer", f"the answer of turn {number} is empty")
        if IMAGE_TAG in answer:
            raise RowError("tag_in_answer", f"an answer holds {IMAGE_TAG}")
    return [turn["value"] for turn in turns[::2]], answers


def _kinds(entry: dict[str, Any], answers: list[str], benchmark: str | None) -> list[str]:
    if entry.get("kinds"):
        kinds = [re.sub(r"[^a-z0-9]+", "_", str(kind).lower()).strip("_") for kind in entry["kinds"]]
        if len(kinds) != len(answers) or not all(kinds):
            raise RowError("kinds", "`kinds` must hold one kind per turn, of letters and digits")
        return kinds
    if (told := entry.get("answer_type")) is not None and entry.get("answers") is None:
        if (kind := _ANSWER_TYPES.get(str(told).strip().lower())) is None:
            raise RowError("answer_type", f"unknown answer_type {told!r}: it must be OPEN or CLOSED")
        return [kind if benchmark is None else f"{benchmark}_{kind}"] * len(answers)
    if benchmark is not None:
        return [benchmark] * len(answers)
    return ["closed" if answer.strip().lower() in CLOSED else "open" for answer in answers]


def _annotations(entry: dict[str, Any], answers: list[str]) -> list[list[str]]:
    given = entry.get("answers")
    if given is None:
        return [[] for _ in answers]
    told = [item.get("answer") if isinstance(item, dict) else item for item in given] if isinstance(given, list) else []
    if len(answers) != 1 or not told or not all(isinstance(answer, str) for answer in told):
        raise RowError("annotations", "`answers` must list what people answered to the one question of its row")
    return [told]
