"""The table of scores, and what is said of data that a model was not trained on."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import ders
from ders.cli.eval import main
from ders.models.bundle import ModelBundle, save_bundle

DATA = [
    "data=medical_vqa",
    "scale=paper",
    f"data.paper.root={ROOT / 'tests' / 'data' / 'fixtures' / 'med_moe'}",
    "data.paper.max_answer_tokens=2",
]
BENCHMARKS = ("pathvqa", "slake", "vqa_rad")


@pytest.fixture
def checkpoint(llava_model: ModelBundle, tmp_path: Path) -> Path:
    ders.upcycle(llava_model.model, layers="all")
    save_bundle(llava_model, tmp_path / "model", {"data": "medical_vqa", "data_hash": "0123456789abcdef"})
    return tmp_path / "model"


def evaluate(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, *arguments: str) -> None:
    given = [f"checkpoint={checkpoint}", f"output_dir={checkpoint.parent}", *arguments]
    monkeypatch.setattr(sys, "argv", ["eval.py", *given])
    monkeypatch.setenv("COLUMNS", "200")
    main()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")]


def test_the_datas_own_scores_stand_in_the_table(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    evaluate(monkeypatch, checkpoint, *DATA, "format=json")
    told = json.loads(capsys.readouterr().out)
    evaluate(monkeypatch, checkpoint, *DATA)
    table = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "┃"))]
    assert table[0] == ["accuracy %", "own score %", "question-only prior %", "questions"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert list(rows) == ["all", *(f"{name}_{kind}" for name in BENCHMARKS for kind in ("closed", "open"))]
    assert rows["all"][1:] == [f"score {100 * told['test/score']:.1f}", f"{100 * told['test/prior']:.1f}", "6"]
    closed, open_ = (rows[f"slake_{kind}"][1] for kind in ("closed", "open"))
    assert closed == f"closed_accuracy {100 * told['test/closed_accuracy/slake_closed']:.1f}"
    assert open_ == f"open_recall {100 * told['test/open_recall/slake_open']:.1f}"


def test_kinds_without_a_scorer_leave_the_column_empty(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    evaluate(
        monkeypatch, checkpoint, *DATA, "~data.paper.scorers", "+data.paper.scorers={slake_closed: closed_accuracy}"
    )
    lines = capsys.readouterr().out.splitlines()
    rows = {row[0]: row[1:] for row in map(cells, lines)}
    assert rows["slake_open"][1] == ""
    assert rows["slake_closed"][1].startswith("closed_accuracy ")
    evaluate(monkeypatch, checkpoint, *DATA, "~data.paper.scorers")
    assert "own score" not in capsys.readouterr().out


def test_other_data_is_told_by_both_hashes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    evaluate(monkeypatch, checkpoint, *DATA)
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "not the very data" in line]
    assert "its hash was 0123456789, that of data=medical_vqa is " in message
    assert "data=…" in message
