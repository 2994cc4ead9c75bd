"""Claims in steps of limited time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL, SMALL_DATA

from ders.reporting.record import read_record

CLAIM = """# @package _global_
# python train.py experiments=steps
defaults:
  - override /hydra/sweeper: runs
hydra:
  mode: MULTIRUN
  sweeper:
    common: seed=0,1
    runs:
      - method=dense
      - method=dense stage.moe.optimizer.lr=-1
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The sources, with a claim of two runs a seed, of which one fails."""
    for name in ("conf", "src", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "train.py", tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "steps.yaml").write_text(CLAIM)
    return tmp_path


def test_a_study_goes_on_where_it_stopped(clone: Path, outputs: Path, command: Callable[..., Any]) -> None:
    pack = clone / "pack.json"

    def step(*more: str) -> tuple[int, dict[str, Any]]:
        dials = ["claims=[steps]", f"pack={pack}", f"output_dir={outputs / 'study'}", "format=json", *more]
        dials.append(f"overrides='{' '.join([*SMALL, *SMALL_DATA])}'")
        done = command(str(clone / "scripts" / "study.py"), *dials, root=clone, env={"DERS_COMMIT": "0" * 40})
        return done.returncode, json.loads(done.stdout)

    # No time at all: the first run, of unknown length, is begun; none after it.
    code, told = step("minutes=0.01")
    assert (told["finished"], told["failed"]) in ((1, 0), (0, 1))
    assert told["left"] == 3
    code, told = step()
    assert (code, told["finished"], told["failed"], told["left"]) == (1, 2, 2, 0)
    records = json.loads(pack.read_text())
    assert sorted(record["seed"] for record in records.values()) == [0, 1]
    assert not list((outputs / "study").glob("dense-*/checkpoints/step_*"))
    # Elsewhere, from the pack alone: nothing finished is run again.
    shutil.rmtree(outputs / "study")
    code, told = step("minutes=0.01")
    assert told["finished"] == 2
    other = outputs / "elsewhere"
    code, told = step("action=unpack", f"output_dir={other}")
    assert (code, told) == (0, {"records": 2})
    assert {read_record(file)["status"] for file in other.glob("*/record.json")} == {"finished"}


@pytest.mark.parametrize(
    ("dial", "message"),
    [("minutes=0", "minutes must be positive"), ("action=x", "run or unpack"), ("claims=[none]", "there is no experi")],
)
def test_bad_dials(dial: str, message: str, command: Callable[..., Any], outputs: Path) -> None:
    done = command(str(ROOT / "scripts" / "study.py"), dial, f"pack={outputs / 'p.json'}")
    assert done.returncode == 1
    assert message in done.stderr
