import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from ders.reporting import figures
from ders.reporting.tables import markdown, percent, rows_of


def record(method: str, seed: int, accuracy: float, **dials: Any) -> dict[str, Any]:
    return {
        "method": method,
        "seed": seed,
        "commit": "c" * 40,
        "config": {"method": {"name": method}, "seed": seed, "num_experts": 4, **dials},
        "added_params": 1192,
        "trainable_params": 812456,
        "stored_bytes": 2**20,
        "metrics": {
            "test/accuracy": {"value": accuracy, "count": 3000},
            "test/accuracy/sum": {"value": accuracy / 2, "count": 500},
            "test/prior": {"value": 0.364, "count": 3000},
            "parent/accuracy": {"value": 0.7, "count": 3000},
        },
    }


RECORDS = [
    record("dense", 0, 0.70),
    record("ders_sm", 1, 0.80, sparsity=0.99),
    record("ders_sm", 0, 0.70, sparsity=0.99),
    record("ders_sm", 0, 0.75, sparsity=0.9),
]


def test_rows_differ_by_more_than_the_seed() -> None:
    rows = rows_of(RECORDS)
    assert [row.label for row in rows] == ["dense", "ders_sm sparsity 0.99", "ders_sm sparsity 0.9"]
    assert [r["seed"] for r in rows[1].records] == [0, 1]
    assert rows[1].mean("test/accuracy") == pytest.approx(0.75)
    assert rows[1].spread("test/accuracy") == pytest.approx(math.sqrt(0.005))
    assert math.isnan(rows[0].spread("test/accuracy"))


def test_a_dial_that_varies_is_shown() -> None:
    rows = rows_of([record("ders_sm", 0, 0.7, sparsity=0.9), record("ders_sm", 0, 0.7, sparsity=0.9, num_experts=8)])
    assert [row.label for row in rows] == ["ders_sm num_experts 4 sparsity 0.9", "ders_sm num_experts 8 sparsity 0.9"]


def test_a_dial_that_older_records_lack_is_not_shown_where_it_changes_nothing() -> None:
    newer = record("ders_sm", 1, 0.7, sparsity=0.99, parent_precision="32-true")
    assert [row.label for row in rows_of([*RECORDS, newer])] == [row.label for row in rows_of(RECORDS)]
    other = record("ders_sm", 0, 0.7, sparsity=0.99, parent_precision="bf16-mixed")
    assert "parent_precision bf16-mixed" in rows_of([*RECORDS, other])[-1].label


def test_table_has_the_controls_beside_the_scores() -> None:
    table = markdown(rows_of(RECORDS), "A claim", "python train.py experiments=a")
    lines = table.splitlines()
    assert "3000 questions" in lines[0]
    assert "commit cccccccccc" in lines[1]
    assert "| ders_sm sparsity 0.99 | 1,192 | 812,456 | 1.00 MiB | 75.0 ± 7.1 | +0.00 | 37.5 ± 3.5 | 2 |" in lines
    assert "less dense, points" in lines[3]
    assert len({line.count("|") for line in lines[3:]}) == 1
    assert any(line.startswith("| *question-only prior* |") and " 36.4 |" in line for line in lines)
    assert any(line.startswith("| *dense parent, before this stage* |") and " 70.0 |" in line for line in lines)


def test_scores_are_compared_with_the_control_of_their_seed() -> None:
    records = [*RECORDS, record("dense", 1, 0.79)]
    lines = markdown(rows_of(records), "A claim", "x").splitlines()
    assert any(" | 75.0 ± 7.1 | +0.50 ± 0.71 | " in line for line in lines)
    loss = [{**r, "metrics": {**r["metrics"], "test/loss": {"value": 2 - r["seed"], "count": 9}}} for r in records]
    lines = markdown(rows_of(loss), "A claim", "x").splitlines()
    assert any(" | 1.5000 ± 0.7071 | +0.0000 ± 0.0000 | 75.0 ± 7.1 | " in line for line in lines)
    assert len({line.count("|") for line in lines[3:]}) == 1
    alone = markdown(rows_of(records[1:4]), "A claim", "x")
    assert "less dense" not in alone
    two = markdown(rows_of([*RECORDS, record("dense", 0, 0.7, num_experts=8)]), "A claim", "x")
    assert "less dense" not in two


def test_parents_that_differ_are_told() -> None:
    other = record("vanilla", 0, 0.7)
    other["metrics"]["parent/accuracy"]["value"] = 0.6
    table = markdown(rows_of([*RECORDS, other]), "A claim", "x")
    assert "| *dense parent, before this stage; 2 different ones, here the first* |" in table
    assert "different ones" not in markdown(rows_of(RECORDS), "A claim", "x")


def test_percent() -> None:
    assert (percent(0.1234), percent(0.5, 0.012), percent(math.nan)) == ("12.3", "50.0 ± 1.2", "–")


@pytest.mark.parametrize("dial", [None, "sparsity"])
@pytest.mark.parametrize("loss", [False, True])
def test_figure(dial: str | None, loss: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, file: (drawn.append(figure), plt.close(figure)))
    extra = {"test/loss": {"value": 1.5, "count": 3000}}
    records = [{**one, "metrics": {**one["metrics"], **(extra if loss else {})}} for one in RECORDS]
    rows = rows_of(records)
    figures.draw_claim(rows, dial, "A claim", tmp_path / "figure.png")
    (axis,) = drawn[0].axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == [str(row.dials.get(dial, row.label)) if dial else row.label for row in rows]
    seeds = [value for line in axis.lines if line.get_marker() == "o" for value in line.get_xdata()]
    # Less the control's of seed 0, the only one it has; the row of two seeds keeps one.
    paired = [one["metrics"]["test/accuracy"]["value"] for one in records if one["seed"] == 0]
    told = [0.0 for _ in paired] if loss else [100 * value - 70 for value in paired]
    assert sorted(seeds) == pytest.approx(sorted(told))
    left, right = axis.get_xlim()
    assert right - left >= (0.02 if loss else 2.0) - 1e-9


def test_many_layers_stand_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, file: (drawn.append(figure), plt.close(figure)))
    keys = [f"routing/layer_{layer}/load_{expert}" for layer in range(0, 14, 2) for expert in range(2)]
    lines = [",".join(["step", *keys]), *(",".join([str(step), *["0.5"] * len(keys)]) for step in (9, 19))]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    figures.draw_run(tmp_path)
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert titles == [*(f"layer {layer}" for layer in range(0, 14, 2)), "", "", ""]
    assert drawn[0].get_figwidth() < 20
