"""Data on disk, ready to be read."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from ders.data.conversation import named_prompt
from ders.data.faults import DataError
from ders.data.rows import Origin, read_rows

SPLITS = ("train", "val", "test")
# Of the stages before the third, whose work a parent that you have (`parent=DIR`) has behind it.
EARLIER_SPLITS = ("pretrain", "instruct")


@functools.lru_cache(maxsize=16)
def _checked_rows(
    file: Path, image_root: Path | None, modified: int, check_images: bool, on_fault: str, origin: Origin
) -> Dataset:
    # Checking decodes every image: once per file and process is enough.
    return read_rows(file, image_root, check_images=check_images, on_fault=on_fault, origin=origin)


@dataclass(frozen=True)
class PreparedData:
    """Files on disk, ready to be read.

    Attributes:
        files: JSON file of each split, in LLaVA's layout, or several of them.
        image_root: folder below which all images lie; None for text-only data.
        labels: per split, {image path: class ids}, one id per patch or one per image; None where nobody knows.
        num_classes: of these labels.
        data_hash: sha256 over all content that is read.
        prompts: names of the prompts that this data is put in.
        check_images, on_fault: as `read_rows` takes them.
        origins: by split and file, where rows do not say all of themselves.
        missing: by split that is named but not there, what to say to who asks for it.
    """

    files: dict[str, Path | Sequence[Path]]
    image_root: Path | None
    data_hash: str
    labels: Path | None = None
    num_classes: int = 0
    prompts: Sequence[str] = ("vicuna",)
    check_images: bool = True
    on_fault: str = "refuse"
    origins: dict[tuple[str, Path], Origin] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def paths(self, split: str) -> list[Path]:
        """The files of a split.

        Raises:
            DataError: there is no such split.
        """
        if split in self.missing:
            raise DataError(f"there is no {split} split: {self.missing[split]}")
        if split not in self.files:
            raise DataError(f"this data has no {split} split: it has {', '.join(self.files)}")
        files = self.files[split]
        return [files] if isinstance(files, Path) else list(files)

    def origin(self, split: str, file: Path) -> Origin:
        return self.origins.get((split, file), Origin())

    def split(self, name: str) -> Dataset:
        """All rows of a split, as `read_rows` gives them.

        Raises:
            DataError: there is no such split, or rows of it cannot be used.
        """
        parts = [
            _checked_rows(
                file,
                self.image_root,
                file.stat().st_mtime_ns,
                self.check_images,
                self.on_fault,
                self.origin(name, file),
            )
            for file in self.paths(name)
        ]
        return parts[0] if len(parts) == 1 else concatenate_datasets(parts)

    def readable(self, name: str) -> Dataset:
        """Those rows of a split that can be used, its images unread: for what needs only the words.

        Raises:
            DataError: there is no such split, or not one row of it can be used.
        """
        try:
            # First as training reads it, where that reads no images either: it may be in memory.
            return dataclasses.replace(self, check_images=False).split(name)
        except DataError:
            return dataclasses.replace(self, check_images=False, on_fault="skip").split(name)

    def image_labels(self, split: str) -> dict[str, list[int]]:
        """Class ids by image path: one per image, or one per patch in reading order."""
        assert self.labels is not None
        found: dict[str, list[int]] = json.loads(self.labels.read_text())[split]
        return found

    def texts(self) -> Iterator[str]:
        """All that a vocabulary must hold: the prompts' own words, every question and answer to train on."""
        for prompt in self.prompts:
            yield named_prompt(prompt).words()
        for split in self.files:
            if split not in ("val", "test"):
                for row in self.split(split):
                    yield from (*row["questions"], *row["answers"])
