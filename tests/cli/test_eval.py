"""The table of scores, and what is said of data that a model was not trained on."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import ders
from ders.cli.eval import main
from ders.evaluation.code_problems import HumanEval
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


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    from ders.models.tiny import TinyLM

    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    recipe = TinyLM(text={**text, **heads})
    save_bundle(recipe.build(problem.prompt for problem in HumanEval().problems()), tmp_path / "model")
    return tmp_path / "model"


CODE = ["evaluation=humaneval", "evaluation.num_problems=2", "evaluation.max_new_tokens=4"]


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("prompt", ["completion", "magicoder"])
def test_code_is_scored_and_kept(
    language_model: Path, prompt: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    chosen = [*CODE, f"evaluation.prompt={prompt}", "allow_code_execution=true", f"samples={tmp_path / 's.jsonl'}"]
    evaluate(monkeypatch, language_model, *chosen, "format=json")
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    expected = {"evaluation": "humaneval", "prompt": prompt, "pass@1": 0.0, "num_problems": 2, "num_available": 164}
    expected |= {"num_passed": 0, "max_new_tokens": 4, "batch_size": 16, "time_limit": 3.0, "interval": "wilson 0.95"}
    assert told.items() >= expected.items()
    assert {"pass@1_low", "pass@1_high", "num_timed_out", "stored_bytes", "dtype", "workers"} <= set(told)
    rows = [json.loads(row) for row in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["task_id"] for row in rows] == ["HumanEval/0", "HumanEval/1"]
    assert all(set(row) == {"task_id", "completion", "passed", "reason"} for row in rows)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "s.jsonl"]


@pytest.mark.usefixtures("sandbox")
def test_right_code_passes_from_the_command_line(
    language_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    answers = [problem.canonical for problem in HumanEval().problems()[:2]]
    monkeypatch.setattr("ders.evaluation.code_scoring.generate_completions", lambda *_: answers)
    evaluate(monkeypatch, language_model, *CODE, "allow_code_execution=true")
    out = capsys.readouterr().out
    assert "pass@1 100.0 % (2 of 2 problems; 95 % interval 34.2 to 100.0), 0 timed out" in out
    assert "only the first 2 of 164 problems" in out


def test_code_is_not_run_unasked(language_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ders.cli.code.load_bundle", lambda *_, **__: pytest.fail("loaded"))
    for given in ([], ["allow_code_execution=false"], ["allow_code_execution=1"]):
        with pytest.raises(SystemExit, match="add allow_code_execution=true"):
            evaluate(monkeypatch, language_model, *CODE, *given)


def test_code_is_not_run_without_a_sandbox(
    language_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ders.cli.code.load_bundle", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get install bubblewrap"):
        evaluate(monkeypatch, language_model, *CODE, "allow_code_execution=true")


@pytest.mark.parametrize("dial", ["samples=s.jsonl", "record=mine"])
def test_samples_and_records_are_of_code(dial: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="add evaluation=humaneval"):
        evaluate(monkeypatch, checkpoint, *DATA, dial)


@pytest.mark.usefixtures("sandbox")
def test_results_become_lines_of_one_table(
    language_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    run = [*CODE, "allow_code_execution=true", f"results={tmp_path / 'results'}"]
    with pytest.raises(SystemExit, match="record must be a name"):
        evaluate(monkeypatch, language_model, *run, "record=a/b")
    monkeypatch.setattr("ders.reporting.record._commit", lambda _: ("c0ffee" * 6, True))
    with pytest.raises(SystemExit, match="commit first"):
        evaluate(monkeypatch, language_model, *run, "record=tiny")
    monkeypatch.setattr("ders.reporting.record._commit", lambda _: ("c0ffee" * 6, False))
    for name in ("tiny", "again"):
        evaluate(monkeypatch, language_model, *run, f"record={name}")
    folder = tmp_path / "results" / "humaneval"
    assert sorted(file.name for file in folder.iterdir()) == ["again.json", "table.md", "tiny.json"]
    record = json.loads((folder / "tiny.json").read_text())
    assert record["config"]["evaluation"]["num_problems"] == record["result"]["num_problems"] == 2
    table = (folder / "table.md").read_text()
    assert "commit c0ffeec0ff." in table
    assert "at most 4 new tokens" in table
    assert [line for line in table.splitlines() if line.startswith("| again | 0.0 | 0.0 to 65.8 | 0 of 2 | 0 |")]
    with pytest.raises(SystemExit, match="made with another max_new_tokens"):
        evaluate(monkeypatch, language_model, *run, "evaluation.max_new_tokens=3", "record=tiny")
    assert json.loads((folder / "tiny.json").read_text()) == record
