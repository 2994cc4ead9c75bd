"""Data sources: what a `data` config describes, prepared into files that one loader reads."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from filelock import FileLock

from ders.data.rows import DataError, read_rows

SPLITS = ("train", "val", "test")


@functools.lru_cache(maxsize=8)
def _checked_rows(file: Path, image_root: Path | None, modified: int) -> Dataset:
    # Checking decodes every image: once per file and process is enough.
    return read_rows(file, image_root)


@dataclass(frozen=True)
class PreparedData:
    """Files on disk, ready to be read.

    Attributes:
        files: JSON file of each split, in LLaVA's layout.
        image_root: folder below which all images lie; None for text-only data.
        labels: per split, {image path: class ids}, one id per patch or one per image; None where nobody knows.
        num_classes: of these labels.
        data_hash: sha256 over all content that is read.
    """

    files: dict[str, Path]
    image_root: Path | None
    data_hash: str
    labels: Path | None = None
    num_classes: int = 0

    def split(self, name: str) -> Dataset:
        if name not in self.files:
            raise DataError(f"this data has no {name} split: it has {', '.join(self.files)}")
        file = self.files[name]
        return _checked_rows(file, self.image_root, file.stat().st_mtime_ns)

    def image_labels(self, split: str) -> dict[str, list[int]]:
        """Class ids by image path: one per image, or one per patch in reading order."""
        assert self.labels is not None
        found: dict[str, list[int]] = json.loads(self.labels.read_text())[split]
        return found

    def texts(self) -> Iterator[str]:
        """Every question and answer of the training split, to build a vocabulary from."""
        for row in json.loads(self.files["train"].read_text()):
            for turn in row["conversations"]:
                yield turn["value"]


@dataclass(kw_only=True)
class DataSource:
    """What every `data` config offers to the rest.

    Attributes:
        image_size: side of the (square) images in pixels; None for text.
        patch_size: side of a patch on which one visual token should look; a model may choose another.
        max_answer_tokens: longest answer that evaluation generates.
        eval_batch_size: questions per evaluation batch.
    """

    image_size: int | None = None
    patch_size: int | None = None
    max_answer_tokens: int = 8
    eval_batch_size: int = 256

    def prepare(self, cache: Path) -> PreparedData:
        """The files of this source, written below `cache` first if need be."""
        raise NotImplementedError


@dataclass(kw_only=True)
class LlavaFiles(DataSource):
    """Files you have: JSON in LLaVA's layout and an image folder.

    Attributes:
        train, val, test: JSON files; the last two may be left out.
        images: the image root; None for text-only data.
    """

    train: str
    val: str | None = None
    test: str | None = None
    images: str | None = None

    def prepare(self, cache: Path) -> PreparedData:
        files = {name: Path(getattr(self, name)) for name in SPLITS if getattr(self, name) is not None}
        for name, file in files.items():
            if not file.is_file():
                raise DataError(f"data.{name}={file}: no such file")
        root = None if self.images is None else Path(self.images)
        if root is not None and not root.is_dir():
            raise DataError(f"data.images={root}: no such folder")
        # Images are not hashed: real sets hold hundreds of gigabytes. Their names are in the JSON.
        return PreparedData(files, root, _hash_files(files.values()))


@dataclass(kw_only=True)
class WrittenSource(DataSource):
    """A data set that this package writes, once, as LLaVA JSON and images: `write` fills an empty folder."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `<split>.json` and what they name below `images/`; returns `{num_classes, labels}` if known."""
        raise NotImplementedError

    def prepare(self, cache: Path) -> PreparedData:
        # How answers are generated changes no file.
        content = {
            k: v for k, v in dataclasses.asdict(self).items() if k not in ("max_answer_tokens", "eval_batch_size")
        }
        key = hashlib.sha256(json.dumps([type(self).__name__, content], sort_keys=True).encode()).hexdigest()[:12]
        folder = cache / "data" / f"{type(self).__name__.lower()}-{key}"
        with building(folder) as unfinished:
            if unfinished is not None:
                known = self.write(unfinished)
                (unfinished / "labels.json").write_text(json.dumps(known.get("labels", {})))
                info = {"num_classes": known.get("num_classes", 0), "data_hash": _hash_files(unfinished.rglob("*.*"))}
                (unfinished / "info.json").write_text(json.dumps(info))
        info = json.loads((folder / "info.json").read_text())
        return PreparedData(
            files={name: folder / f"{name}.json" for name in SPLITS},
            image_root=folder / "images",
            data_hash=info["data_hash"],
            labels=folder / "labels.json" if info["num_classes"] else None,
            num_classes=info["num_classes"],
        )


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path | None]:
    """Build a folder once: yields an empty folder to fill, or None where it is built already.

    Only one process builds, the others wait; the folder appears whole or not at all.
    """
    if folder.is_dir():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            yield None
            return
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(folder)


def _hash_files(files: Any) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps(rows, indent=0))


def conversation(turns: list[tuple[str, str, str]], *, image: bool) -> dict[str, Any]:
    """`conversations` and `kinds` from (kind, question, answer) turns; the first question carries the image."""
    messages = []
    for number, (_, question, answer) in enumerate(turns):
        tag = "<image>\n" if image and number == 0 else ""
        messages += [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
    return {"conversations": messages, "kinds": [kind for kind, _, _ in turns]}
