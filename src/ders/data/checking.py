"""What is wrong with a split, and how long and how mixed its rows are, told before step 0."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ders.data.conversation import IGNORED, Encoder
from ders.data.faults import DataError, FaultyRow, RowError
from ders.data.images import inspect_image
from ders.data.prepared import PreparedData
from ders.data.rows import raw_rows, sift

_FIRST = 5
_AT_ONCE = 10_000

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Found:
    """How often something was met, and the first places."""

    count: int
    first: list[str]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of the usable rows: median, the one that 95 % do not exceed, longest."""

    median: float
    p95: int
    max: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """What `max_length` does: rows that lose their end, rows that lose every answer and so teach nothing, and rows
    whose image it ends in, at which training stops."""

    max_length: int
    rows: int
    without_answer: int
    within_image: int


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """A split as `check_split` found it.

    Attributes:
        rows, faulty_rows: in all, and of those the ones that cannot be used.
        faults: by kind.
        notes: what is odd but can be used, by kind.
        text_only: share of the usable rows without an image.
        images: different images.
        shared_images, most_rows_of_an_image: images that several rows use, and how many rows use the commonest.
        words, tokens: lengths; tokens with a tokenizer only, visual ones included.
        cut: None without a tokenizer or a max_length.
    """

    rows: int
    faulty_rows: int
    faults: dict[str, Found]
    notes: dict[str, Found]
    text_only: float
    images: int
    shared_images: int
    most_rows_of_an_image: int
    words: Lengths | None
    tokens: Lengths | None = None
    cut: Cut | None = None


def check_split(
    prepared: PreparedData,
    split: str,
    encoder: Encoder | None = None,
    *,
    workers: int = 8,
    progress: Progress = lambda done, total: None,
) -> SplitReport:
    """Read every row and every image of a split, and stop at none.

    Args:
        encoder: counts tokens, and what its `max_length` cuts.
        workers: threads that read images.
        progress: called with (images read, images in all).

    Raises:
        DataError: a file is missing or not JSON.
    """
    files = [(path, raw_rows(path)) for path in prepared.paths(split)]
    named = (prepared.origin(split, path).place(image) for path, raw in files for image in _images_of(raw))
    images = [image for image in dict.fromkeys(named) if image is not None]
    inspected = dict(zip(images, _inspect(images, prepared.image_root, workers, progress), strict=True))
    rows: list[dict[str, Any]] = []
    faulty: list[tuple[Path, FaultyRow]] = []
    for path, raw in files:
        usable, refused = sift(raw, prepared.origin(split, path), lambda image: inspected[image][0])
        rows += usable
        faulty += [(path, row) for row in refused]
    uses = Counter(row["image"] for row in rows if row["image"] is not None)
    tokens, cut = _token_lengths(rows, encoder) if encoder is not None else (None, None)
    return SplitReport(
        rows=sum(len(raw) for _, raw in files),
        faulty_rows=len(faulty),
        faults=_grouped((row.kind, f"{path.name}: {row}") for path, row in faulty),
        notes=_grouped((note, image) for image, (_, note) in inspected.items() if note is not None),
        text_only=sum(row["image"] is None for row in rows) / max(len(rows), 1),
        images=len(images),
        shared_images=sum(count > 1 for count in uses.values()),
        most_rows_of_an_image=max(uses.values(), default=0),
        words=_lengths([sum(len(text.split()) for text in (*r["questions"], *r["answers"])) for r in rows]),
        tokens=tokens,
        cut=cut,
    )


def _images_of(raw: list[Any]) -> Iterator[str]:
    named = (row.get("image") for row in raw if isinstance(row, dict))
    return (image for image in named if isinstance(image, str))


def _inspect(
    images: Sequence[str], root: Path | None, workers: int, progress: Progress
) -> Iterator[tuple[RowError | None, str | None]]:
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(images), _AT_ONCE):
            batch = images[start : start + _AT_ONCE]
            for done, found in enumerate(pool.map(lambda image: inspect_image(image, root), batch), start=start + 1):
                yield found
                progress(done, len(images))


def _token_lengths(rows: list[dict[str, Any]], encoder: Encoder) -> tuple[Lengths | None, Cut | None]:
    whole = dataclasses.replace(encoder, max_length=None)
    lengths, without_answer, within_image = [], 0, 0
    for row in rows:
        lengths.append(len(whole.conversation(row["questions"], row["answers"])[0]))
        if encoder.max_length is not None and lengths[-1] > encoder.max_length:
            try:
                _, labels = encoder.conversation(row["questions"], row["answers"])
                without_answer += all(label == IGNORED for label in labels)
            except DataError:
                within_image += 1
    if encoder.max_length is None:
        return _lengths(lengths), None
    longer = sum(length > encoder.max_length for length in lengths)
    return _lengths(lengths), Cut(encoder.max_length, longer, without_answer, within_image)


def _grouped(met: Iterable[tuple[str, str]]) -> dict[str, Found]:
    places: dict[str, list[str]] = defaultdict(list)
    for kind, place in met:
        places[kind].append(place)
    return {kind: Found(len(found), found[:_FIRST]) for kind, found in sorted(places.items())}


def _lengths(values: list[int]) -> Lengths | None:
    if not values:
        return None
    return Lengths(float(np.median(values)), int(np.percentile(values, 95, method="higher")), max(values))
