"""Several processes against one: real groups of two, over gloo."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ders.evaluation.processes_suite import (
    MAX_LOSS_DIFFERENCE,
    MAX_WEIGHT_DIFFERENCE,
    equivalence_suite,
    losses,
    run_jobs,
    tiny_llava,
    weights_difference,
)
from ders.evaluation.worker import Job
from ders.reporting.survival import equivalence_markdown

SOME = ("zero1", "zero3", "fsdp2")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    work = tmp_path_factory.mktemp("processes") / "work"
    return equivalence_suite(work, ["ders_sm"], SOME, ["one step, one batch", "continued"])


def holds(record: dict) -> None:
    for row in record["rows"]:
        assert row["loss_difference"] <= MAX_LOSS_DIFFERENCE, row
        assert row["weights_difference"] <= MAX_WEIGHT_DIFFERENCE, row


def test_two_processes_train_as_one(record: dict) -> None:
    assert {row["strategy"] for row in record["rows"]} == {"single", *SOME}
    holds(record)


@pytest.mark.slow
def test_every_method_and_strategy_in_every_case(tmp_path: Path) -> None:
    record = equivalence_suite(tmp_path / "work")
    assert len(record["rows"]) == 4 * 5 + 5 * 2 * 5 + 4 * 6
    holds(record)


def test_a_continued_run_ends_as_a_whole_one(record: dict) -> None:
    continued = {row["strategy"]: row for row in record["rows"] if row["case"] == "continued"}
    assert continued.keys() == {"single", *SOME}
    assert continued["single"]["weights_difference"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "other"), [("ddp", "single"), ("fsdp2", "fsdp2")])
def test_a_run_goes_on_with_other_processes(strategy: str, other: str, tmp_path: Path) -> None:
    parent = str(tiny_llava(tmp_path / "parent"))
    two = Job("ders_sm", strategy, parent, str(tmp_path / "run"), 6, stop_after=3, devices=2)
    whole = Job("ders_sm", "single", parent, str(tmp_path / "whole"), 6)
    run_jobs([two], 2, tmp_path)
    run_jobs([whole, replace(two, strategy=other, devices=1, stop_after=None, resume=True)], 1, tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=MAX_LOSS_DIFFERENCE)
    assert weights_difference(tmp_path / "run", tmp_path / "whole") <= MAX_WEIGHT_DIFFERENCE
    zero = replace(two, strategy="zero1", folder=str(tmp_path / "run"), stop_after=None, resume=True)
    with pytest.raises(RuntimeError, match="divided otherwise"):
        run_jobs([zero], 2, tmp_path)


def test_the_table_says_what_was_compared(record: dict) -> None:
    described = {"commit": "0" * 40, "command": "x", "hardware": {"cores": 2, "cpu": "some"}}
    table = equivalence_markdown(described | json.loads(json.dumps(record)))
    assert "| ders_sm |" in table
    assert "goal (5 of 5 met)" in table
