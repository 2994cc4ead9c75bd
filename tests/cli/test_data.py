"""The data check as a command, and the data configurations that hold two scales."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from ders.cli.app import composed, prepare_hydra
from ders.cli.data import main
from ders.cli.instantiation import instantiate
from ders.data import DigitsVQA, InstructionFiles, LlavaMix
from ders.data.faults import DataError
from ders.models.tiny import word_tokenizer

FIXTURES = ROOT / "tests" / "data" / "fixtures"
PAPER: dict[str, Any] = {"llava_mix": LlavaMix, "medical_vqa": LlavaMix, "evol_code": InstructionFiles}


def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["data.py", "action=check", f"output_dir={tmp_path}", *arguments])
    main()


@pytest.fixture
def faulty(tmp_path: Path) -> list[str]:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This one"}]
    rows = [{"id": "good", "conversations": turns}, {"id": "bad", "conversations": [turns[0], {"from": "bot"}]}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    return ["data=llava_files", f"data.train={tmp_path / 'train.json'}"]


def test_faulty_rows_are_told_and_end_with_1(
    faulty: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as ended:
        check(monkeypatch, tmp_path, *faulty)
    assert ended.value.code == 1
    told = capsys.readouterr().out
    assert "2 rows, 1 of them faulty; text only 100.0 %" in told
    assert "fault unknown_speaker: 1\n    train.json: row 1 (bad): unknown speaker 'bot'" in told
    assert told.endswith("1 rows cannot be used\n")


def test_json_is_one_object(faulty: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        check(monkeypatch, tmp_path, *faulty, "format=json")
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert (told["data"], told["faulty_rows"], list(told["splits"])) == ("llava_files", 1, ["train"])
    assert told["splits"]["train"]["faults"]["unknown_speaker"]["count"] == 1
    assert told["splits"]["train"]["words"] == {"median": 3.0, "p95": 3, "max": 3}


def test_good_data_of_every_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    word_tokenizer(["grey tiles"]).save_pretrained(tmp_path / "tokenizer")
    given = {
        "llava_mix": [f"data.paper.root={FIXTURES / 'moe_llava'}", f"tokenizer={tmp_path / 'tokenizer'}"],
        "medical_vqa": [f"data.paper.root={FIXTURES / 'med_moe'}"],
        "evol_code": [f"data.paper.train={FIXTURES / 'code' / 'evol_codealpaca_v1.jsonl'}"],
    }
    rows = {}
    for name, arguments in given.items():
        check(monkeypatch, tmp_path, f"data={name}", "scale=paper", "format=json", *arguments)
        told = json.loads(capsys.readouterr().out)
        rows[name] = {split: report["rows"] for split, report in told["splits"].items()}
        assert told["faulty_rows"] == 0
        if name == "llava_mix":
            assert told["splits"]["train"]["notes"]["GIF named .jpg"]["count"] == 1
            # 24 × 24 visual tokens, a caption of six words, and what stands around it.
            assert told["splits"]["pretrain"]["tokens"]["max"] > 576 + 6
            assert told["splits"]["pretrain"]["cut"]["max_length"] == 2048
    assert rows == {
        "llava_mix": {"pretrain": 2, "instruct": 6, "train": 4},
        "medical_vqa": {"pretrain": 1, "instruct": 1, "train": 3, "test": 6},
        "evol_code": {"train": 3},
    }


def test_max_length_can_be_tried(
    faulty: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    word_tokenizer(["What This one"]).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(SystemExit):
        check(monkeypatch, tmp_path, *faulty, f"tokenizer={tmp_path / 'tokenizer'}", "max_length=4")
    assert "max_length=4: 1 rows lose their end, 1 every answer, 0 part of an image" in capsys.readouterr().out


def test_a_split_becomes_a_task_of_a_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = tmp_path / "task"
    given = ["data=digits_text", f"output={folder}", *(f"data.num_{split}=2" for split in ("train", "val", "test"))]
    check(monkeypatch, tmp_path, "action=harness", *given)
    first, command = capsys.readouterr().out.splitlines()
    assert first == "12 questions; `make lm-eval` once, then"
    assert command.endswith(f" --tasks ders_digits_text_test --include_path {folder}")
    assert len((folder / "ders_digits_text_test.jsonl").read_text().splitlines()) == 12
    given[1] = f"output={tmp_path / 'val'}"
    check(monkeypatch, tmp_path, "action=harness", "split=val", "format=json", *given)
    told = json.loads(capsys.readouterr().out)
    assert (told["harness"], told["task"], told["num_questions"]) == ("lm-eval", "ders_digits_text_val", 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=digits_vqa", "action=mend"], "action must be check or harness: got 'mend'"),
        (["data=digits_vqa", "action=harness"], "action=harness writes a folder: name it, output=DIR"),
        (["data=digits_vqa", "action=harness", "output=task", "split=exam"], "no exam split"),
        (["data=digits_vqa", "workers=0"], "workers must be a whole number from 1 on: got 0"),
        (["data=digits_vqa", "format=xml"], "format must be table or json"),
        (["data=digits_vqa", "tokenizer=/none"], "tokenizer=/none: no such folder"),
        (["data=llava_mix", "scale=paper"], r"set data\.paper\.root=DIR"),
        (["data=evol_code", "scale=paper"], r"set data\.paper\.train=FILE"),
        ([], "You must specify 'data'"),
    ],
)
def test_errors_say_what_to_do(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message):
        check(monkeypatch, tmp_path, *arguments)


@pytest.mark.parametrize("name", PAPER)
def test_a_configuration_holds_both_scales(name: str, tmp_path: Path) -> None:
    prepare_hydra()
    tiny = instantiate(composed("train", [f"data={name}"]).data)
    assert isinstance(tiny, DigitsVQA)
    assert (tiny.image_size, tiny.patch_size) == ((None, None) if name == "evol_code" else (16, 8))
    paper = instantiate(composed("train", [f"data={name}", "scale=paper"]).data)
    assert isinstance(paper, PAPER[name])
    assert (paper.image_size, paper.patch_size) == ((None, None) if name == "evol_code" else (336, 14))
    with pytest.raises(DataError, match=r"set data\.paper\."):
        paper.prepare(tmp_path)


def test_scored_kinds_are_the_papers_benchmarks() -> None:
    prepare_hydra()
    known = set(yaml.safe_load((ROOT / "src" / "ders" / "reporting" / "published.yaml").read_text())["benchmarks"])
    assert set(instantiate(composed("train", ["data=llava_mix", "scale=paper"]).data).scorers) < known
    medical = instantiate(composed("train", ["data=medical_vqa", "scale=paper"]).data)
    kinds = {f"{benchmark}_{kind}" for benchmark in medical.splits["test"] for kind in ("open", "closed")}
    assert kinds < known
