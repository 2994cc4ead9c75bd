"""Several processes against one: real groups of two, over gloo."""

import json
from pathlib import Path

import pytest

from ders.evaluation.processes_suite import MAX_LOSS_DIFFERENCE, MAX_WEIGHT_DIFFERENCE, equivalence_suite
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
    assert len(record["rows"]) == 4 * 5 + 3 * 2 * 5 + 4 * 6
    holds(record)


def test_a_continued_run_ends_as_a_whole_one(record: dict) -> None:
    continued = {row["strategy"]: row for row in record["rows"] if row["case"] == "continued"}
    assert continued.keys() == {"single", *SOME}
    assert continued["single"]["weights_difference"] == 0


def test_the_table_says_what_was_compared(record: dict) -> None:
    described = {"commit": "0" * 40, "command": "x", "hardware": {"cores": 2, "cpu": "some"}}
    table = equivalence_markdown(described | json.loads(json.dumps(record)))
    assert "| ders_sm |" in table
    assert "goal (5 of 5 met)" in table
