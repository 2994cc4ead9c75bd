import subprocess
from pathlib import Path
from typing import Any

import pytest

from ders.reporting import RecordError, finish_record, read_record, start_record, write_record

CONFIG: dict[str, Any] = {"seed": 3, "method": {"name": "ders_sm"}, "scale": "tiny"}
RESULTS = {
    "data_hash": "ab",
    **dict.fromkeys(["added_params", "trainable_params", "total_params", "active_params", "stored_bytes"], 1),
    "metrics": {"test/accuracy": {"value": 0.5, "count": 4}},
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for line in ["init -q", "config user.email a@b.c", "config user.name a", "commit -q --allow-empty -m one"]:
        subprocess.run(["git", "-C", str(tmp_path), *line.split()], check=True)
    return tmp_path


def test_round_trip(repository: Path) -> None:
    record = finish_record(start_record(repository, CONFIG, ["train.py"]), "finished", **RESULTS)
    assert read_record(write_record(record, repository / "r" / "record.json")) == record
    assert record["seed"] == 3
    assert len(record["commit"]) == 40


def test_dirty_ignores_runs_and_results(repository: Path) -> None:
    for name in ("results", "outputs"):
        (repository / name).mkdir()
        (repository / name / "x.json").write_text("{}")
    assert start_record(repository, CONFIG, [])["dirty"] is False
    (repository / "code.py").write_text("")
    assert start_record(repository, CONFIG, [])["dirty"] is True


def test_without_git_the_environment_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("DERS_COMMIT", "f" * 40)
    assert start_record(tmp_path, CONFIG, [])["commit"] == "f" * 40
    monkeypatch.delenv("DERS_COMMIT")
    assert start_record(tmp_path, CONFIG, [])["commit"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"test/accuracy": {"value": 50.0, "count": 4}}},
        {"metrics": {"test/accuracy": {"value": 0.5}}},
        {"metrics": {"accuracy": {"value": 0.5, "count": 4}}},
        {"status": "done"},
        {"total_params": None},
        {"error": "but finished"},
        {"surprise": 1},
    ],
)
def test_the_schema_refuses(change: dict[str, Any], repository: Path) -> None:
    record = finish_record(start_record(repository, CONFIG, []), "finished", **RESULTS) | change
    with pytest.raises(RecordError, match="does not fit the schema"):
        write_record(record, repository / "record.json")
    assert not (repository / "record.json").exists()


def test_a_failed_run_needs_no_results(repository: Path) -> None:
    record = finish_record(start_record(repository, CONFIG, []), "failed", "ValueError: no")
    assert read_record(write_record(record, repository / "record.json"))["status"] == "failed"


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(RecordError, match=r"record\.json: .*required property"):
        read_record(tmp_path / "record.json")
