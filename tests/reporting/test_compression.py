import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from ders.reporting import compression
from ders.reporting.compression import compression_markdown, draw_against_bytes, paired
from ders.reporting.tables import rows_of


def record(seed: int, accuracy: float, expert_bytes: int | None = None, **config: Any) -> dict[str, Any]:
    before = {"vanilla/accuracy": {"value": 0.8 + 0.01 * seed, "count": 3000}} if expert_bytes else {}
    name = config.pop("name", None)
    compression = {"compression": {"name": name}} if name else {}
    return {
        "method": "vanilla",
        "seed": seed,
        "commit": "c" * 40,
        "config": {"method": {"name": "vanilla"}, "seed": seed, "num_experts": 4, **compression, **config},
        "added_params": 1192,
        "stored_bytes": 2**22,
        **({"expert_bytes": expert_bytes} if expert_bytes else {}),
        "metrics": {
            "test/accuracy": {"value": accuracy, "count": 3000},
            "test/prior": {"value": 0.364, "count": 3000},
            "parent/accuracy": {"value": 0.7, "count": 3000},
            **before,
        },
    }


RECORDS = [
    *(record(seed, 0.8 + 0.01 * seed) for seed in (0, 1)),
    *(
        record(seed, accuracy + 0.01 * seed, size, name="quantize", bits=bits, scheme="uniform", base="parent")
        for bits, accuracy, size in [(8, 0.8, 2**21), (1, 0.75, 2**20)]
        for seed in (0, 1)
    ),
    *(record(seed, 0.79, 2**20, name="base_only", base="mean") for seed in (0, 1)),
]


def test_differences_are_taken_seed_by_seed() -> None:
    rows = rows_of(RECORDS)
    assert [row.label for row in rows] == ["vanilla", "quantize bits 8", "quantize bits 1", "base_only"]
    assert paired(rows[0]) == []
    assert paired(rows[2]) == pytest.approx([-0.05, -0.05])
    assert rows[2].spread("test/accuracy") == pytest.approx(math.sqrt(0.00005))


def test_the_table() -> None:
    lines = compression_markdown(rows_of(RECORDS), "A claim", "python train.py experiments=a").splitlines()
    assert "| vanilla | 1,192 |  | 4.00 MiB | 80.5 ± 0.7 |  | 2 |" in lines
    assert "| quantize bits 1 | 1,192 | 1.00 MiB | 4.00 MiB | 75.5 ± 0.7 | -5.00 ± 0.00 | 2 |" in lines
    assert "| *question-only prior* |  |  |  | 36.4 |  |  |" in lines


def test_the_figure(tmp_path: Path) -> None:
    file = draw_against_bytes(rows_of(RECORDS), "A claim", tmp_path / "figure.png")
    assert file.read_bytes()[:4] == b"\x89PNG"


def by_loss(one: dict[str, Any]) -> dict[str, Any]:
    """The same record of a task that is scored by likelihood."""
    losses = {
        key.replace("accuracy", "loss"): {**value, "value": 2 - value["value"]}
        for key, value in one["metrics"].items()
        if "accuracy" in key
    }
    return {**one, "metrics": {**one["metrics"], **losses}}


def test_a_single_seed_has_a_difference_and_no_spread(tmp_path: Path) -> None:
    rows = rows_of([by_loss(one) for one in RECORDS if one["seed"] == 0])
    lines = compression_markdown(rows, "A claim", "python train.py experiments=a").splitlines()
    row = "| quantize bits 1 | 1,192 | 1.00 MiB | 4.00 MiB | 1.2500 | +0.0500 | 75.0 | -5.00 | 1 |"
    assert row in lines
    assert draw_against_bytes(rows, "A claim", tmp_path / "figure.png").exists()


@pytest.mark.parametrize("scored", [dict, by_loss])
def test_upwards_is_better(scored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(compression, "save", lambda figure, file: (figures.append(figure), plt.close(figure)))
    draw_against_bytes(rows_of([scored(one) for one in RECORDS]), "A claim", tmp_path / "figure.png")
    (axis,) = figures[0].axes
    (curve,) = axis.containers
    _, heights = curve.lines[0].get_data()
    unit = 100 if scored is dict else 1
    assert list(heights) == pytest.approx([-0.05 * unit, 0], abs=1e-9)
    assert {-5, -2} <= set(axis.get_yticks(minor=True)) or scored is by_loss
    assert axis.get_ylabel().endswith("points" if scored is dict else "nats")
    parent = next(line for line in axis.lines if line.get_label().startswith("dense parent"))
    assert parent.get_ydata()[0] == pytest.approx(-0.105 * unit)
