"""Files you have: LLaVA JSON, one file a split or many, and instructions in JSON lines."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ders.data.faults import DataError
from ders.data.prepared import EARLIER_SPLITS, SPLITS, PreparedData
from ders.data.rows import Origin
from ders.data.source import DataSource, hash_files, refuse_unknown_splits

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FileSource(DataSource):
    """Data that is there, and may be faulty.

    Attributes:
        check_images: decode every image before training. False for sets of hundreds of thousands: an image that cannot
            be read then stops the run where it is reached, unless `scripts/data.py action=check` has found it before.
        on_fault: refuse the data for a row that cannot be used, or skip such rows and log them.
    """

    check_images: bool = True
    on_fault: str = "refuse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_fault not in ("refuse", "skip"):
            raise ValueError(f"{self.dials}.on_fault must be refuse or skip: got {self.on_fault!r}")

    def _prepared(
        self, files: Mapping[str, Path | Sequence[Path]], images: Path | None, test: str, **more: Any
    ) -> PreparedData:
        """The files as they are read; without a test split the log says so, and that the dial `test` sets one."""
        if "test" not in files:
            log.warning("no test split: this run will have no score; set %s", test)
        # Images are not hashed: real sets hold hundreds of gigabytes. Their names are in the JSON.
        return PreparedData(
            dict(files),
            images,
            hash_files([path for paths in files.values() for path in ([paths] if isinstance(paths, Path) else paths)]),
            prompts=self.prompts,
            check_images=self.check_images,
            on_fault=self.on_fault,
            **more,
        )


@dataclass(kw_only=True)
class LlavaFiles(FileSource):
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
                raise DataError(f"{self.dials}.{name}={file}: no such file")
        root = None if self.images is None else Path(self.images)
        if root is not None and not root.is_dir():
            raise DataError(f"{self.dials}.images={root}: no such folder")
        return self._prepared(files, root, f"{self.dials}.test=FILE")


@dataclass(kw_only=True)
class LlavaMix(FileSource):
    """A set of many JSON files in LLaVA's layout over one image folder, as MoE-LLaVA and Med-MoE lay theirs out.

    Attributes:
        root: the folder that holds the JSON files.
        repo: a data set on the Hugging Face Hub to fetch the JSON files from instead; `revision` of it. Its images
            come packed: unpack them into a folder and set `images` to that.
        splits: JSON files below the root, by split: `train`, and what there is of `pretrain` and `instruct` (the stages
            before), `val` and `test`. A mapping instead of a list names the benchmark that each file is; the kinds of
            its questions are then `<name>`, or `<name>_open` and `<name>_closed` where rows have an `answer_type` and
            no `answers` of several people. A file that is named must be there; but for those of `pretrain` and
            `instruct`, which a parent that you have does without: such a split is left out, and the log says so.
        images: the folder of the images, relative to the root or absolute; None for text-only data.
        image_folders: of the splits whose image paths start in a folder below `images`.

    Raises:
        ValueError: a split is unknown.
    """

    root: str | None = None
    repo: str | None = None
    revision: str | None = None
    splits: dict[str, list[str] | dict[str, str] | None] = field(default_factory=dict)
    images: str | None = "."
    image_folders: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unknown_splits("splits", self.splits)
        refuse_unknown_splits("image_folders", self.image_folders)

    def prepare(self, cache: Path) -> PreparedData:
        root = self._root(cache)
        files: dict[str, list[Path]] = {}
        origins: dict[tuple[str, Path], Origin] = {}
        missing: dict[str, str] = {}
        for split, named in self.splits.items():
            paths = [root / name for name in _file_names(named)]
            if not paths:
                continue
            if (absent := next((path for path in paths if not path.is_file()), None)) is not None:
                dial = f"{self.dials}.splits.{split}"
                told = f"{absent}: no such file. {dial} names it below {root}"
                if split not in EARLIER_SPLITS:
                    raise DataError(told if split == "train" else f"{told}; {dial}=null leaves the split out")
                log.warning("the %s split is left out: %s", split, told)
                missing[split] = told
                continue
            files[split] = paths
            folder = self.image_folders.get(split, "")
            names = named if isinstance(named, dict) else [None] * len(paths)
            origins |= {(split, path): Origin(name, folder) for path, name in zip(paths, names, strict=True)}
        if "train" not in files:
            raise DataError(f"{self.dials}.splits has no train: name its JSON files")
        images = None if self.images is None else root / self.images
        if images is not None and not images.is_dir():
            raise DataError(f"{self.dials}.images={images}: no such folder")
        test = f"{self.dials}.splits.test={{BENCHMARK: FILE}}"
        return self._prepared(files, images, test, origins=origins, missing=missing)

    def _root(self, cache: Path) -> Path:
        if self.root is not None:
            if not Path(self.root).is_dir():
                raise DataError(f"{self.dials}.root={self.root}: no such folder")
            return Path(self.root)
        if self.repo is None:
            raise DataError(
                f"this data is not part of ders: set {self.dials}.root=DIR to the folder that holds its JSON files, or "
                f"{self.dials}.repo=ID and {self.dials}.images=DIR to fetch them from the Hub"
            )
        from huggingface_hub import snapshot_download  # needs the network: only where it is asked for

        wanted = [name for named in self.splits.values() for name in _file_names(named)]
        try:
            return Path(
                snapshot_download(
                    self.repo,
                    repo_type="dataset",
                    revision=self.revision,
                    allow_patterns=wanted,
                    local_dir=cache / "hub" / self.repo.replace("/", "--"),
                )
            )
        except Exception as error:  # of the network, of the Hub, of the name
            raise DataError(f"{self.dials}.repo={self.repo}: cannot be fetched: {error}") from error


def _file_names(named: list[str] | dict[str, str] | None) -> list[str]:
    return list(named.values()) if isinstance(named, dict) else named or []
