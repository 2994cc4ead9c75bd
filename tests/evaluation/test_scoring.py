import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ders.data.metrics import is_correct


def test_scores_are_those_of_the_written_folder(run_job: Callable[..., Path]) -> None:
    folder = run_job("seed=8")
    record = json.loads((folder / "record.json").read_text())
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
    assert len(predictions) == 48  # 8 images, 6 questions each
    for metric, field in [("accuracy", "prediction"), ("prior", "prior")]:
        correct = [is_correct(p[field], p["answer"]) for p in predictions]
        assert record["metrics"][f"test/{metric}"] == {"value": pytest.approx(sum(correct) / 48), "count": 48}
    assert record["metrics"]["test/accuracy/sum"]["count"] == 8
