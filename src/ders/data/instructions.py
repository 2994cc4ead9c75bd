"""Instructions and responses, as code models are tuned on."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from ders.data.faults import DataError
from ders.data.files import FileSource
from ders.data.prepared import PreparedData
from ders.data.rows import IMAGE_TAG
from ders.data.source import building, hash_files, write_rows

_RESPONSES = ("response", "output")  # Magicoder-Evol-Instruct-110K and evol-codealpaca-v1


@dataclass(kw_only=True)
class InstructionFiles(FileSource):
    """Rows of `instruction` and `response` (or `output`): JSON or JSON lines, or a data set on the Hub.

    They are written once into LLaVA's layout. Where a text speaks of an `<image>` it means no picture: it is written
    `< image>`, so that no model takes it for one.

    Attributes:
        train, val, test: JSON files; the last two may be left out.
        repo: a data set on the Hugging Face Hub, all of whose training split is the training split; `revision` of it.
    """

    train: str | None = None
    val: str | None = None
    test: str | None = None
    repo: str | None = None
    revision: str | None = None
    prompt: str = "magicoder"
    max_length: int | None = 1024

    def prepare(self, cache: Path) -> PreparedData:
        given = {name: Path(file) for name in ("train", "val", "test") if (file := getattr(self, name)) is not None}
        if "train" not in given and self.repo is None:
            raise DataError(
                f"this data is not part of ders: set {self.dials}.train=FILE to JSON lines of instruction and "
                f"response, or {self.dials}.repo=ID to fetch them from the Hub"
            )
        for name, file in given.items():
            if not file.is_file():
                raise DataError(f"{self.dials}.{name}={file}: no such file")
        content = [sorted(given), hash_files(given.values()), self.repo, self.revision]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
        folder = cache / "data" / f"instructions-{key}"
        with building(folder) as unfinished:
            if unfinished is not None:
                for name, file in given.items():
                    write_rows(
                        unfinished / f"{name}.json", _rows(_load("json", cache, data_files=str(file)), str(file))
                    )
                if "train" not in given:
                    fetched = _load(str(self.repo), cache, revision=self.revision)
                    write_rows(unfinished / "train.json", _rows(fetched, str(self.repo)))
        files: dict[str, Any] = {file.stem: file for file in sorted(folder.glob("*.json"))}
        # No configuration has the key: hence the plus.
        return self._prepared(files, None, f"+{self.dials}.test=FILE")


def _load(name: str, cache: Path, **options: Any) -> Dataset:
    try:
        return load_dataset(name, split="train", cache_dir=str(cache / "datasets"), **options)
    except Exception as error:  # of the network, of the Hub, of a broken line
        told = error.__cause__ or error
        raise DataError(f"{options.get('data_files', name)}: cannot be read: {told}") from error


def _rows(dataset: Dataset, name: str) -> list[dict[str, Any]]:
    response = next((column for column in _RESPONSES if column in dataset.column_names), None)
    if "instruction" not in dataset.column_names or response is None:
        raise DataError(
            f"{name}: needs the columns instruction and {' or '.join(_RESPONSES)}: it has "
            f"{', '.join(dataset.column_names)}"
        )
    return [
        {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": _text(row["instruction"])},
                {"from": "gpt", "value": _text(row[response])},
            ],
        }
        for number, row in enumerate(dataset)
    ]


def _text(value: Any) -> str:
    # A missing value becomes an empty one, which reading then refuses by name.
    return "" if value is None else str(value).replace(IMAGE_TAG, "< image>")
