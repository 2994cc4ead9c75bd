"""Everything a data check must find, planted."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ders.data import LlavaFiles
from ders.data.checking import Cut, Lengths, check_split
from ders.data.faults import DataError
from ders.data.prepared import PreparedData
from ders.models.tiny import word_tokenizer


def row(name: str, image: str | None, *texts: str, speaker: str = "human") -> dict[str, Any]:
    turns = [{"from": (speaker, "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": name, "conversations": turns} | ({} if image is None else {"image": image})


@pytest.fixture
def planted(tmp_path: Path) -> PreparedData:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "good.jpg")
    Image.new("P", (8, 8)).save(images / "gif.jpg", format="GIF")
    (images / "torn.jpg").write_bytes((images / "good.jpg").read_bytes()[:200])
    (tmp_path / "secret.jpg").write_bytes((images / "good.jpg").read_bytes())
    rows = [
        row("ok", "good.jpg", "<image>\nWhat is it?", "a square"),
        row("same", "good.jpg", "<image>\nWhich colour?", "black"),
        row("gif", "gif.jpg", "<image>\nWhat is it?", "a gif"),
        row("text", None, "How are you?", "very well thank you"),
        row("bot", None, "Hello?", "Hi", speaker="bot"),
        row("tag", None, "<image>\nWhat?", "this"),
        row("untagged", "good.jpg", "What?", "this"),
        row("gone", "gone.jpg", "<image>\nWhat?", "this"),
        row("gone too", "gone.jpg", "<image>\nWhy?", "this"),
        row("torn", "torn.jpg", "<image>\nWhat?", "this"),
        row("out", "../secret.jpg", "<image>\nWhat?", "this"),
        row("silent", None, "What?", ""),
        "text",
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    return LlavaFiles(train=str(tmp_path / "train.json"), images=str(images)).prepare(tmp_path)


def test_every_fault_is_counted_by_kind(planted: PreparedData) -> None:
    seen: list[tuple[int, int]] = []
    report = check_split(planted, "train", workers=2, progress=lambda done, total: seen.append((done, total)))
    assert (report.rows, report.faulty_rows) == (13, 9)
    assert {kind: found.count for kind, found in report.faults.items()} == {
        "unknown_speaker": 1,
        "tag_without_image": 1,
        "image_without_tag": 1,
        "missing_image": 2,
        "corrupt_image": 1,
        "outside_root": 1,
        "empty_answer": 1,
        "not_an_object": 1,
    }
    assert report.faults["unknown_speaker"].first == [
        "train.json: row 4 (bot): unknown speaker 'bot': turns are from human and from gpt"
    ]
    assert [place.split(": ")[1] for place in report.faults["missing_image"].first] == [
        "row 7 (gone)",
        "row 8 (gone too)",
    ]
    assert report.notes["GIF named .jpg"].first == ["gif.jpg"]
    assert list(report.notes) == ["GIF named .jpg"]
    assert seen == [(done, 5) for done in range(1, 6)]
    with pytest.raises(DataError, match="9 of 13 rows cannot be used"):  # training counts the same
        planted.split("train")


def test_lengths_and_mixture_are_of_the_usable_rows(planted: PreparedData) -> None:
    report = check_split(planted, "train")
    assert report.words == Lengths(median=6.0, p95=7, max=7)  # 6, 4, 6, 7
    assert report.text_only == 0.25
    assert (report.images, report.shared_images, report.most_rows_of_an_image) == (5, 1, 2)
    assert report.tokens is None
    assert report.cut is None


def test_what_max_length_would_cut(planted: PreparedData, tmp_path: Path) -> None:
    rows = [
        row("a", None, "one two", "yes"),
        row("b", None, "one two three four", "yes"),
        row("c", None, "one", "yes no"),
    ]
    rows += [row("d", "good.jpg", "one two three four five <image>", "yes")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    source = LlavaFiles(train=str(tmp_path / "train.json"), images=str(tmp_path / "images"), max_length=9)
    encoder = source.encoder(word_tokenizer(["one two three four five yes no"]), 4)
    report = check_split(source.prepare(tmp_path), "train", encoder)
    # <s> USER : … ASSISTANT : … </s>: 6 tokens around the words; d holds 4 more of an image.
    assert report.tokens == Lengths(median=(9 + 11) / 2, p95=16, max=16)
    assert report.cut == Cut(max_length=9, rows=2, without_answer=1, within_image=1)


def test_long_lists_are_cut_short(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([row(str(i), None, "What?", "") for i in range(20)]))
    report = check_split(LlavaFiles(train=str(tmp_path / "train.json")).prepare(tmp_path), "train")
    assert (report.faults["empty_answer"].count, len(report.faults["empty_answer"].first)) == (20, 5)
    assert (report.words, report.text_only) == (None, 0.0)
