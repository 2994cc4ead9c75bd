import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ders.data import DigitsVQA, EasyVQA, LlavaFiles
from ders.data.easy import COLOURS, SHAPES
from ders.data.rows import DataError
from ders.data.source import building


def digits(tmp_path: Path, **options: object) -> object:
    return DigitsVQA(num_train=40, num_val=10, num_test=10, **options).prepare(tmp_path)


def test_digits_are_written_once_and_alike(tmp_path: Path) -> None:
    first = digits(tmp_path / "a")
    stamp = first.files["train"].stat().st_mtime_ns
    again, elsewhere, other = digits(tmp_path / "a"), digits(tmp_path / "b"), digits(tmp_path / "a", seed=1)
    assert again.files["train"].stat().st_mtime_ns == stamp
    assert first.data_hash == again.data_hash == elsewhere.data_hash != other.data_hash


def test_answers_are_true_of_the_pictured_digits(tmp_path: Path) -> None:
    prepared = digits(tmp_path)
    labels = prepared.image_labels("test")
    for row in prepared.split("test"):
        told = labels[row["image"]]
        expected = {
            "largest": max(told),
            "smallest": min(told),
            "sum": sum(told),
            "even": sum(d % 2 == 0 for d in told),
        }
        asked = dict(zip(row["kinds"], zip(row["questions"], row["answers"], strict=True), strict=True))
        assert {kind: int(asked[kind][1]) for kind in expected} == expected
        assert asked["zero"][1] == ("yes" if 0 in told else "no")
        bound = int(asked["greater"][0].rstrip("?").split()[-1])
        assert int(asked["greater"][1]) == sum(d > bound for d in told)


def test_no_scan_serves_two_splits(tmp_path: Path) -> None:
    prepared = DigitsVQA(num_train=300, num_val=100, num_test=200).prepare(tmp_path)
    tiles: dict[str, set[bytes]] = {}
    for split in ("train", "val", "test"):
        images = [np.array(Image.open(prepared.image_root / image)) for image in prepared.image_labels(split)]
        tiles[split] = {i[r : r + 8, c : c + 8].tobytes() for i in images for r in (0, 8) for c in (0, 8)}
    assert tiles["train"].isdisjoint(tiles["test"] | tiles["val"])
    assert tiles["val"].isdisjoint(tiles["test"])


def test_digits_as_text(tmp_path: Path) -> None:
    prepared = digits(tmp_path, images=False)
    rows = prepared.split("train")
    assert set(rows["image"]) == {None}
    assert all(q.startswith("The digits are ") for q in rows[0]["questions"])
    assert prepared.labels is None


def test_easy_vqa_is_the_published_set(tmp_path: Path) -> None:
    prepared = EasyVQA(num_val=20, num_train=200).prepare(tmp_path)
    assert sum(len(q) for q in prepared.split("test")["questions"]) == 9673
    rows = {row["image"]: row for row in prepared.split("train")}
    assert len(rows) == 200
    for image, (label,) in prepared.image_labels("train").items():
        if label >= 0:
            shape, colour = SHAPES[label // len(COLOURS)], COLOURS[label % len(COLOURS)]
            told = dict(zip(rows[image]["kinds"], rows[image]["answers"], strict=True))
            assert told.get("shape", shape) == shape
            assert told.get("colour", colour) == colour


def test_own_files(tmp_path: Path) -> None:
    prepared = digits(tmp_path)
    own = LlavaFiles(train=str(prepared.files["train"]), images=str(prepared.image_root)).prepare(tmp_path)
    assert len(own.split("train")) == 40
    with pytest.raises(DataError, match="no test split: it has train"):
        own.split("test")
    with pytest.raises(DataError, match=r"data\.val=/none\.json: no such file"):
        LlavaFiles(train=str(prepared.files["train"]), val="/none.json").prepare(tmp_path)
    with pytest.raises(DataError, match=r"data\.images=/none: no such folder"):
        LlavaFiles(train=str(prepared.files["train"]), images="/none").prepare(tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with building(tmp_path / "x") as unfinished:
            (unfinished / "half").write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert not (tmp_path / "x").exists()
    with building(tmp_path / "x") as unfinished:
        assert not any(unfinished.iterdir())
        (unfinished / "whole.json").write_text(json.dumps(1))
    with building(tmp_path / "x") as unfinished:
        assert unfinished is None
