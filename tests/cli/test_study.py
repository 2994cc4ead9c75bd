"""Claims in steps of limited time."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, SMALL_DATA

from ders.cli import study
from ders.reporting.record import read_record

# One of them is refused.
CLAIM = {"runs": ["method=dense", "method=dense stage.moe.optimizer.lr=-1"], "common": "seed=0"}


def step(monkeypatch: pytest.MonkeyPatch, capsys: Any, *dials: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["study.py", "format=json", *dials])
    monkeypatch.setattr(study, "read_claim", lambda name: CLAIM)
    code = 0
    try:
        study.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return code, json.loads(capsys.readouterr().out)


def test_a_study_goes_on_where_it_stopped(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pack, runs = tmp_path / "pack.json", outputs / "study"
    given = f"overrides='{' '.join([*SMALL, *SMALL_DATA])}'"
    dials = ["claims=[steps]", f"pack={pack}", f"output_dir={runs}", given]
    # The first run, of unknown length, is begun; there is no time for another.
    assert step(monkeypatch, capsys, *dials, "minutes=0.01") == (
        0,
        {"finished": 1, "failed": 0, "left": 1, "records": 1, "pack": str(pack)},
    )
    assert not list(runs.glob("dense-*/checkpoints"))
    code, told = step(monkeypatch, capsys, *dials)
    assert (code, told["finished"], told["failed"], told["left"]) == (1, 1, 1, 0)
    # Elsewhere, from the pack alone: what is finished is not run again.
    shutil.rmtree(runs)
    assert step(monkeypatch, capsys, *dials, "minutes=1e-6")[1]["finished"] == 1
    assert not list(runs.glob("dense-*"))
    assert step(monkeypatch, capsys, *dials, "action=unpack") == (0, {"records": 1})
    (record,) = (read_record(file) for file in runs.glob("*/record.json"))
    assert (record["status"], record["method"]) == ("finished", "dense")


@pytest.mark.parametrize(
    ("dial", "message"),
    [("minutes=0", "minutes must be positive"), ("action=x", "run or unpack"), ("claims=[none]", "there is no experi")],
)
def test_bad_dials(dial: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py", dial, f"pack={tmp_path / 'p.json'}"])
    with pytest.raises(SystemExit, match=message):
        study.main()
