"""Losses of answers that stand there, against one token at a time in float64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ders.data import DigitsVQA
from ders.evaluation.likelihood import BigramPrior
from ders.evaluation.scoring import score
from ders.models.tiny import TinyLM

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = DigitsVQA(
        num_train=20, num_val=2, num_test=7, images=False, scored_by="likelihood", eval_batch_size=3, max_length=60
    )
    prepared = source.prepare(tmp_path_factory.mktemp("cache"))
    torch.manual_seed(0)
    bundle = TinyLM(text={"model_type": "llama", "num_key_value_heads": 2, **SIZES}).build(prepared.texts())
    return bundle, source, prepared, score(bundle, source, prepared, "test", "test")


def test_every_answer_token_is_foretold_from_all_before_it(scored: Any) -> None:
    bundle, source, prepared, result = scored
    encoder = source.encoder(bundle.tokenizer, 0, "test")
    model = bundle.model.double()
    total = correct = count = 0
    for row, item in zip(prepared.split("test"), result.predictions, strict=True):
        ids, labels = encoder.conversation(row["questions"], row["answers"])
        losses = []
        for place in range(1, len(ids)):
            if labels[place] == -100:
                continue
            with torch.no_grad():
                logits = model(torch.tensor([ids[:place]])).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[ids[place]].item())
            correct += int(logits.argmax() == ids[place])
        assert item["loss"] == pytest.approx(sum(losses), rel=1e-5)
        assert item["tokens"] == len(losses)
        total, count = total + sum(losses), count + len(losses)
    model.float()
    assert result.metrics["test/loss"] == {"value": pytest.approx(total / count, rel=1e-5), "count": count}
    assert result.metrics["test/perplexity"]["value"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result.metrics["test/accuracy"]["value"] == pytest.approx(correct / count)


def test_the_prior_knows_the_token_before_and_nothing_else() -> None:
    def row(*answer: int) -> dict[str, Any]:
        return {"ids": [9, *answer], "labels": [-100, *answer]}

    prior = BigramPrior([row(1, 2, 1, 2), row(1, 3)])
    assert prior.num_correct(row(1, 2)) == 2  # after 9 comes 1, after 1 most often 2
    assert prior.num_correct(row(1, 3)) == 1
    assert prior.num_correct({"ids": [7, 1], "labels": [-100, 1]}) == 1  # never met: the commonest of all


def test_a_run_says_its_loss(run_job: Any, tmp_path: Path) -> None:
    import json

    folder = run_job(
        "model=tiny_lm", "data=digits_text", "+data.scored_by=likelihood", "stage.moe.max_steps=2", "seed=3"
    )
    record = json.loads((folder / "record.json").read_text())
    metrics = record["metrics"]
    assert metrics["test/perplexity"]["value"] == pytest.approx(math.exp(metrics["test/loss"]["value"]))
    assert metrics["test/loss"]["value"] > 1  # more than a fraction can be: the schema knows
    assert 0 < metrics["test/prior"]["value"] < 1
    assert "parent/loss" in metrics
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert "val/loss" in rows[0]
