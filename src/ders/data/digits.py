"""Questions over tiled real handwritten digits (scikit-learn's scans)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ders.data.source import WrittenSource, conversation, write_rows


@dataclass(kw_only=True)
class DigitsVQA(WrittenSource):
    """Four 8×8 scans tiled 2×2, six questions an image, open and closed. No scan serves two splits.

    Attributes:
        num_train, num_val, num_test: images of each split.
        images: False writes the digits into each question instead: the same task for a model that reads only text.
        seed: which scans, which order, which questions.
    """

    image_size: int | None = 16
    patch_size: int | None = 8
    num_train: int = 6000
    num_val: int = 200
    num_test: int = 500
    images: bool = True
    seed: int = 0

    def write(self, folder: Path) -> dict[str, Any]:
        from sklearn.datasets import load_digits  # slow to import, and needed once

        rng = np.random.default_rng(self.seed)
        scans = load_digits()
        order = rng.permutation(len(scans.target))
        # Disjoint scans: 60 % for training, 10 % for validation, 30 % for the test.
        pools = np.split(order, [int(0.6 * len(order)), int(0.7 * len(order))])
        labels: dict[str, dict[str, list[int]]] = {}
        for split, count, pool in zip(
            ("train", "val", "test"), (self.num_train, self.num_val, self.num_test), pools, strict=True
        ):
            rows = []
            labels[split] = {}
            (folder / "images" / split).mkdir(parents=True)
            for number in range(count):
                picked = rng.choice(pool, 4)
                digits = [int(d) for d in scans.target[picked]]
                row: dict[str, Any] = {"id": f"{split}-{number}"}
                turns = _questions(digits, rng)
                if self.images:
                    row["image"] = f"{split}/{number}.png"
                    labels[split][row["image"]] = digits
                    _save_tiles(scans.images[picked], folder / "images" / row["image"])
                else:
                    told = f"The digits are {' '.join(map(str, digits))}."
                    turns = [(kind, f"{told} {question}", answer) for kind, question, answer in turns]
                rows.append({**row, **conversation(turns, image=self.images)})
            write_rows(folder / f"{split}.json", rows)
        return {"num_classes": 10, "labels": labels} if self.images else {}


def _questions(digits: list[int], rng: np.random.Generator) -> list[tuple[str, str, str]]:
    bound = int(rng.integers(1, 9))
    turns = [
        ("largest", "What is the largest digit?", max(digits)),
        ("smallest", "What is the smallest digit?", min(digits)),
        ("even", "How many digits are even?", sum(d % 2 == 0 for d in digits)),
        ("greater", f"How many digits are greater than {bound}?", sum(d > bound for d in digits)),
        ("zero", "Is any digit zero?", "yes" if 0 in digits else "no"),
        ("sum", "What is the sum of the digits?", sum(digits)),
    ]
    return [(kind, question, str(answer)) for kind, question, answer in (turns[i] for i in rng.permutation(6))]


def _save_tiles(scans: np.ndarray, file: Path) -> None:
    top, bottom = np.hstack(scans[:2]), np.hstack(scans[2:])
    grey = (np.vstack([top, bottom]) * (255 / 16)).round().astype(np.uint8)
    Image.fromarray(grey).save(file)
