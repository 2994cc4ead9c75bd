"""The table of how alike experts stay."""

import copy
from typing import Any

from ders.reporting.identity import digest, identity
from ders.reporting.similarity import similarity_markdown
from ders.reporting.tables import rows_of


def record(lr: float, steps: int, seed: int, loss: float) -> dict[str, Any]:
    config = {"seed": seed, "stage": {"moe": {"optimizer": {"lr": lr}, "max_steps": steps}}, "trainer": {}}
    metrics = {"test/loss": {"value": loss, "count": 70}, "test/accuracy": {"value": 0.5, "count": 70}}
    return {"method": "vanilla", "seed": seed, "config": config, "metrics": metrics, "commit": "c" * 40}


def test_a_line_per_rate_and_length() -> None:
    records = [record(1e-3, 50, 0, 1.5), record(1e-3, 50, 1, 1.7), record(1e-4, 50, 0, 1.2), record(1e-4, 9, 0, 1.9)]
    kept = {}
    for number, one in enumerate(records):
        cosines = [[1.0, 0.9 - number / 100, 0.95], [0.9 - number / 100, 1.0, 0.8], [0.95, 0.8, 1.0]]
        kept[f"vanilla-{digest(identity(one['config']))}"] = {
            "layers": {"0": {"up_proj": cosines}},
            "ratios": {"0": {"up_proj": [0.25 + number / 10, 0.1]}},
        }
    dropped = copy.deepcopy(kept)
    dropped.popitem()
    text = similarity_markdown(rows_of(records), kept, "Title", "python x")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count(" | ") for line in table}) == 1
    lines = table[2:]
    assert [line.split(" | ")[:2] for line in lines] == [["| 0.0001", "9"], ["| 0.0001", "50"], ["| 0.001", "50"]]
    # Over both seeds: the largest distances, the largest delta, the mean loss.
    assert lines[2] == "| 0.001 | 50 | 1.1e-01 | 2.0e-01 | 7.8e-02 | 35.00 | 1.6000 ± 0.1414 | 2 |"
    assert "Loss of an answer's token in nats" in text
    assert len(similarity_markdown(rows_of(records), dropped, "Title", "x").splitlines()) == len(text.splitlines()) - 1
