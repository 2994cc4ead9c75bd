"""The published easy-VQA set: drawn shapes, thirteen answers."""

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ders.data.source import WrittenSource, conversation, write_rows

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
IGNORED = -100  # the class that cross-entropy leaves out


@dataclass(kw_only=True)
class EasyVQA(WrittenSource):
    """easy-VQA 1.0 (MIT licence): 4,000 training and 1,000 test images of 64 px, one shape of one colour each.

    A few training images are held out for validation; the test split is the published one.

    Attributes:
        num_val: images held out of the training split.
        num_train, num_test: use only this many images; None for all.
        seed: which images are held out, and the order of an image's questions.
    """

    image_size: int | None = 64
    patch_size: int | None = 16
    num_val: int = 200
    num_train: int | None = None
    num_test: int | None = None
    seed: int = 0

    def write(self, folder: Path) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        spec = find_spec("easy_vqa")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("data=easy_vqa reads the package easy-vqa: pip install easy-vqa==1.0")
        root = Path(spec.origin).parent / "data"
        train = self._images(root / "train", rng)
        order = [int(i) for i in rng.permutation(sorted(train))]
        splits = {
            "train": ("train", train, order[self.num_val :][: self.num_train]),
            "val": ("train", train, order[: self.num_val]),
        }
        test = self._images(root / "test", rng)
        splits["test"] = ("test", test, sorted(test)[: self.num_test])
        labels: dict[str, dict[str, list[int]]] = {}
        for split, (source, turns, chosen) in splits.items():
            (folder / "images" / split).mkdir(parents=True)
            labels[split] = {}
            rows = []
            for number in chosen:
                image = f"{split}/{number}.png"
                shutil.copyfile(root / source / "images" / f"{number}.png", folder / "images" / image)
                labels[split][image] = [_label(turns[number])]
                rows.append({"id": f"{split}-{number}", "image": image, **conversation(turns[number], image=True)})
            write_rows(folder / f"{split}.json", rows)
        return {"num_classes": len(SHAPES) * len(COLOURS), "labels": labels}

    @staticmethod
    def _images(folder: Path, rng: np.random.Generator) -> dict[int, list[tuple[str, str, str]]]:
        """(kind, question, answer) turns by image number, each image's in a drawn order."""
        turns: dict[int, list[tuple[str, str, str]]] = defaultdict(list)
        for question, answer, image in json.loads((folder / "questions.json").read_text()):
            turns[image].append((_kind(answer), question[0].upper() + question[1:], answer))
        return {image: [asked[i] for i in rng.permutation(len(asked))] for image, asked in turns.items()}


def _kind(answer: str) -> str:
    return "closed" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour"


def _label(turns: list[tuple[str, str, str]]) -> int:
    """Shape and colour of an image as one class, read off its questions; IGNORED where they do not tell."""
    shape = colour = None
    for _, question, answer in turns:
        words = question.lower().rstrip("?").split()
        # "what is the blue shape?" tells a colour; "is there not a circle?" tells a shape when the answer is no.
        true = answer if answer not in ("yes", "no") else "no" if {"no", "not"} & set(words) else "yes"
        told = [answer, *(words if answer == true else [])]
        shape = next((s for s in SHAPES if s in told), shape)
        colour = next((c for c in COLOURS if c in told), colour)
    if shape is None or colour is None:
        return IGNORED
    return SHAPES.index(shape) * len(COLOURS) + COLOURS.index(colour)
