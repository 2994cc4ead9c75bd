import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ders.data.rows import DataError, Origin, read_rows

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
TEXT = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes"}]


def write(folder: Path, rows: Any) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / "images" / "a.png")
    file = folder / "train.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return file


def test_good_rows(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "image": "a.png", "conversations": TURNS + TEXT},
        {"id": "text", "conversations": TEXT},
        {"conversations": TEXT, "kinds": ["Open-ended (Q1)"]},
    ]
    read = read_rows(write(tmp_path, rows), tmp_path / "images")
    assert read["id"] == ["7", "text", ""]
    assert read["image"] == ["a.png", None, None]
    assert read["kinds"] == [["open", "closed"], ["closed"], ["open_ended_q1"]]
    assert read["answers"][0] == ["A dog.", "Yes"]


def picture_header(width: int, height: int) -> bytes:
    """What a picture (PGM) claims about itself; there are no pixels behind it."""
    return f"P5 {width} {height} 255\n".encode()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x", "image": "b.png", "conversations": TURNS}, r"row 0 \(x\): b.png: missing below"),
        ({"id": "x", "image": "../secret.png", "conversations": TURNS}, "the path leaves the image root"),
        ({"id": "x", "image": "/etc/passwd", "conversations": TURNS}, "the path leaves the image root"),
        ({"id": "x", "image": "link.png", "conversations": TURNS}, "the path leaves the image root"),
        ({"id": "x", "image": "broken.png", "conversations": TURNS}, "broken.png: unreadable"),
        ({"id": "x", "image": "cut.png", "conversations": TURNS}, "cut.png: unreadable"),
        ({"id": "x", "image": "bomb.png", "conversations": TURNS}, "refused as a decompression bomb"),
        ({"id": "x", "image": "small_bomb.png", "conversations": TURNS}, "refused as a decompression bomb"),
        ({"id": "x", "image": "a.png", "conversations": TEXT}, "0 <image> tags in the questions, but an image"),
        ({"id": "x", "conversations": TURNS}, "1 <image> tags in the questions, but no image"),
        ({"id": "x", "conversations": TURNS[:1]}, "in pairs"),
        ({"id": "x", "conversations": TEXT[::-1]}, "must alternate"),
        ({"id": "x", "conversations": [TEXT[0], {"from": "gpt", "value": "<image>"}]}, "an answer holds <image>"),
        ({"id": "x"}, "in pairs"),
        ({"id": "x", "image": 3, "conversations": TURNS}, "must be a path"),
        ({"id": "x", "conversations": TEXT, "kinds": ["a", "b"]}, "one kind per turn"),
        ("text", "not an object"),
        ({"id": "x", "conversations": [TEXT[0], {"from": "gpt", "value": " "}]}, "the answer of turn 1 is empty"),
        ({"id": "x", "conversations": [TEXT[0], {"from": "bot", "value": "Yes"}]}, "unknown speaker 'bot'"),
        ({"id": "x", "conversations": [{"from": "system", "value": "!"}, *TEXT, TEXT[0]]}, "unknown speaker 'system'"),
        ({"id": "x", "conversations": TEXT, "answer_type": "maybe"}, "unknown answer_type 'maybe'"),
        ({"id": "x", "conversations": TEXT, "answers": "yes"}, "`answers` must list what people answered"),
        ({"id": "x", "conversations": TEXT * 2, "answers": ["yes"]}, "`answers` must list what people answered"),
        ({"id": "x", "image": "a.png", "conversations": TURNS * 2}, "2 <image> tags in the questions, but an image"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_rows_are_named(tmp_path: Path, row: Any, message: str) -> None:
    file = write(tmp_path, [row])
    images = tmp_path / "images"
    (images / "broken.png").write_text("this is no picture")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:40])
    (tmp_path / "secret.png").write_bytes((images / "a.png").read_bytes())
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    # Half as large as what Pillow itself refuses.
    (images / "small_bomb.png").write_bytes(picture_header(10_000, 10_000))
    (images / "bomb.png").write_bytes(picture_header(20_000, 20_000))
    with pytest.raises(DataError, match=message):
        read_rows(file, images)


def test_answer_types_and_benchmarks_name_kinds(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "conversations": TEXT, "answer_type": "OPEN "},
        {"id": 2, "conversatons": TEXT, "answer_type": "close"},
        {"id": 3, "conversations": TEXT, "answers": [{"answer": "yes"}, {"answer": "no"}]},
        {"id": 4, "conversations": TEXT, "kinds": ["mine"]},
    ]
    file = write(tmp_path, rows)
    assert read_rows(file, None)["kinds"] == [["open"], ["closed"], ["closed"], ["mine"]]
    named = read_rows(file, None, origin=Origin("slake"))
    assert named["kinds"] == [["slake_open"], ["slake_closed"], ["slake"], ["mine"]]
    assert named["annotations"] == [[[]], [[]], [["yes", "no"]], [[]]]


def test_the_answer_types_of_several_people_split_no_benchmark(tmp_path: Path) -> None:
    types = ["yes/no", "number", "other", "unanswerable", None]
    rows = [{"id": 1, "conversations": TEXT, "answer_type": told, "answers": ["yes"] * 10} for told in types]
    file = write(tmp_path, rows)
    assert read_rows(file, None, origin=Origin("vqav2"))["kinds"] == [["vqav2"]] * 5
    assert read_rows(file, None)["kinds"] == [["closed"]] * 5


def test_what_to_do_about_faulty_rows_is_told(tmp_path: Path) -> None:
    file = write(tmp_path, [{"id": "x"}])
    with pytest.raises(DataError, match=r"scripts/data\.py action=check .*; the data's on_fault=skip leaves"):
        read_rows(file, None)
    with pytest.raises(DataError, match=r"scripts/data\.py action=check") as error:
        read_rows(file, None, on_fault="skip")  # no row is left
    assert "on_fault" not in str(error.value)


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    # A line separator of Unicode within a text ends no line.
    turns = [TEXT[0], {"from": "gpt", "value": "one\u2028line"}]
    file.write_text("\n".join(json.dumps({"conversations": turns}, ensure_ascii=False) for _ in range(2)) + "\n")
    assert read_rows(file, None)["answers"] == [["one\u2028line"]] * 2


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    rows = [{"id": i, "image": f"{i}.png", "conversations": TURNS} for i in range(13)]
    with pytest.raises(DataError, match="13 of 13 rows cannot be used") as error:
        read_rows(write(tmp_path, rows), tmp_path / "images")
    assert "… and 3 more" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not a JSON file"), ("[]", "non-empty list"), ("{}", "non-empty")]
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path, content), tmp_path / "images")
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "nothing.json", None)


def test_images_without_a_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.images .* is not set"):
        read_rows(write(tmp_path, [{"id": 1, "image": "a.png", "conversations": TURNS}]), None)
