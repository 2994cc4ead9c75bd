"""Data sources: what a `data` config describes, prepared into files that one loader reads."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock

from ders.data.conversation import Encoder, named_prompt
from ders.data.prepared import EARLIER_SPLITS, SPLITS, PreparedData
from ders.data.scores import SCORERS


@dataclass(kw_only=True)
class DataSource:
    """What every `data` config offers to the rest.

    Attributes:
        image_size: side of the (square) images in pixels; None for text.
        patch_size: side of a patch on which one visual token should look; a model may choose another.
        max_answer_tokens: longest answer that evaluation generates.
        eval_batch_size: questions per evaluation batch.
        prompt: how turns become text, a name in `ders.data.conversation.PROMPTS`.
        split_prompts: prompts of the splits that have another.
        max_length: longest conversation in tokens, visual ones included; what is longer loses its end. None for any.
        scorers: question kind → scorer, a name in `ders.data.scores.SCORERS`. A key may be a pattern (`vqa_rad_*`) or
            the beginning of kinds (`vqa_rad`); the longest that fits counts.
        scored_by: `answers` that a model generates, or the `likelihood` it gives to the answers that stand there, where
            these are too long to be met word by word.

    Raises:
        ValueError: there is no such prompt, scorer, split or way to score, or max_length is no length.
    """

    image_size: int | None = None
    patch_size: int | None = None
    max_answer_tokens: int = 8
    eval_batch_size: int = 256
    prompt: str = "vicuna"
    split_prompts: dict[str, str] = field(default_factory=dict)
    max_length: int | None = None
    scorers: dict[str, str] = field(default_factory=dict)
    scored_by: str = "answers"

    # Where the dials of this source lie, for messages.
    dials: ClassVar[str] = "data"

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            named_prompt(prompt)
        refuse_unknown_splits("split_prompts", self.split_prompts)
        for scorer in self.scorers.values():
            if scorer not in SCORERS:
                raise ValueError(f"{self.dials}.scorers must name {', '.join(SCORERS)}: got {scorer!r}")
        if self.scored_by not in ("answers", "likelihood"):
            raise ValueError(f"{self.dials}.scored_by must be answers or likelihood: got {self.scored_by!r}")
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 1):
            raise ValueError(f"{self.dials}.max_length must be a whole number from 1 on: got {self.max_length!r}")

    @property
    def prompts(self) -> tuple[str, ...]:
        """Names of all prompts that this data is put in."""
        return (self.prompt, *self.split_prompts.values())

    def encoder(self, tokenizer: Any, image_tokens: int, split: str = "train") -> Encoder:
        """Turns the conversations of a split into token ids."""
        prompt = named_prompt(self.split_prompts.get(split, self.prompt))
        return Encoder(tokenizer, image_tokens, prompt, self.max_length)

    def prepare(self, cache: Path) -> PreparedData:
        """The files of this source, written below `cache` first if need be."""
        raise NotImplementedError


def refuse_unknown_splits(dial: str, named: Iterable[str]) -> None:
    """Names of splits that no data has would be silently without effect.

    Raises:
        ValueError: `dial` names a split that no data has.
    """
    known = (*SPLITS, *EARLIER_SPLITS)
    for split in named:
        if split not in known:
            raise ValueError(f"{dial} of the data names an unknown split {split!r}: choose from {', '.join(known)}")


# How the data is read and asked changes no file.
_OF_NO_FILE = {f.name for f in dataclasses.fields(DataSource)} - {"image_size", "patch_size"}


def by_scale(
    *,
    scale: str,
    tiny: DataSource,
    paper: DataSource,
    image_size: int | None = None,
    patch_size: int | None = None,
) -> DataSource:
    """The source of a configuration that holds two, one for each scale.

    Args:
        scale: tiny or paper.
        image_size, patch_size: of the chosen one's images.

    Raises:
        ValueError: there is no such scale.
    """
    if scale not in ("tiny", "paper"):
        raise ValueError(f"scale must be tiny or paper: got {scale!r}")
    chosen = dataclasses.replace(tiny if scale == "tiny" else paper, image_size=image_size, patch_size=patch_size)
    chosen.dials = f"data.{scale}"
    return chosen


@dataclass(kw_only=True)
class WrittenSource(DataSource):
    """A data set that this package writes, once, as LLaVA JSON and images: `write` fills an empty folder."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `<split>.json` and what they name below `images/`; returns `{num_classes, labels}` if known."""
        raise NotImplementedError

    def content(self) -> dict[str, Any]:
        """What decides the files, as plain data: other content is written to another folder."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _OF_NO_FILE}

    def prepare(self, cache: Path) -> PreparedData:
        content = json.dumps([type(self).__name__, self.content()], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:12]
        folder = cache / "data" / f"{type(self).__name__.lower()}-{key}"
        with building(folder) as unfinished:
            if unfinished is not None:
                known = self.write(unfinished)
                (unfinished / "labels.json").write_text(json.dumps(known.get("labels", {})))
                info = {"num_classes": known.get("num_classes", 0), "data_hash": hash_files(unfinished.rglob("*.*"))}
                (unfinished / "info.json").write_text(json.dumps(info))
        info = json.loads((folder / "info.json").read_text())
        return PreparedData(
            files={name: folder / f"{name}.json" for name in SPLITS},
            image_root=folder / "images",
            data_hash=info["data_hash"],
            labels=folder / "labels.json" if info["num_classes"] else None,
            num_classes=info["num_classes"],
            prompts=self.prompts,
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


def hash_files(files: Any) -> str:
    """sha256 over the names and contents of files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
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
