"""A campaign that is cut short goes on; its cells: tests/training/test_processes.py."""

from pathlib import Path
from typing import Any

import pytest

from ders.evaluation.fault_suite import METHODS, TRAINERS, Campaign


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is measured, without measuring it."""
    done: list[str] = []
    told = {"kills": 3, "hung": 0, "unreadable": 0, "lost": 0, "weights_difference": 0.0}

    def cell(self: Campaign, method: str, trainer: str) -> dict[str, Any]:
        if len(done) == 5:
            done.append("cut")
            raise KeyboardInterrupt
        done.append(f"{method} {trainer}")
        return {"method": method, "trainer": trainer, **told}

    monkeypatch.setattr(Campaign, "cell", cell)
    monkeypatch.setattr(Campaign, "disk", lambda self, trainer: [{"trainer": trainer, "not_measured": "x"}])
    return done


def test_a_campaign_goes_on_with_the_cell_that_was_cut(measured: list[str], tmp_path: Path) -> None:
    def campaign(seconds: float = 60, commit: str | None = "a") -> Any:
        return Campaign(tmp_path / "train.py", tmp_path / "work", 3, seconds, commit=commit).run()

    with pytest.raises(KeyboardInterrupt):
        campaign()
    assert campaign(seconds=0) is None
    record = campaign()
    measured.remove("cut")
    assert measured == [f"{method} {trainer}" for method in METHODS for trainer in TRAINERS]
    assert [(row["method"], row["trainer"]) for row in record["rows"]] == [tuple(name.split()) for name in measured]
    assert (record["goals"][0]["figure"], record["goals"][0]["met"]) == (36, True)
    assert record["seconds"] > 0
    measured.extend(["x"] * 5)  # past the place where it was cut
    for other in ("b", None):  # other sources, or sources nobody knows: from the beginning
        before = len(measured)
        assert len(campaign(commit=other)["rows"]) == 12
        assert len(measured) - before == 12
