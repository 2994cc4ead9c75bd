"""ders models in lm-evaluation-harness: the tokens it sends, the likelihoods it sees, and the score it gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness_cases import DATA, LEARNING, data_of, log_likelihoods, written

from ders.data.conversation import PROMPTS, Encoder
from ders.evaluation.scoring import score
from ders.harness.tasks import write_task
from ders.models.bundle import ModelBundle, load_bundle

pytestmark = pytest.mark.slow

QUESTIONS = ["what is it?", "is this one it?", "USER: this"]
ANSWERS = [" this one", " it", " is it what"]


@pytest.mark.parametrize("kind", ["subwords", "llava_model"])
def test_tokens_and_likelihoods(
    kind: str, request: pytest.FixtureRequest, probe: Callable[..., Any], tmp_path: Path
) -> None:
    folder = written(request.getfixturevalue(kind), tmp_path / "model", "llava_v1")
    told = probe(
        "lm-eval", {"folder": str(folder), "prompts": ["auto", None], "questions": QUESTIONS, "answers": ANSWERS}
    )
    bundle = load_bundle(folder)
    encoder = Encoder(bundle.tokenizer, template=PROMPTS["llava_v1"])
    prompts = [encoder.prompt(question) for question in QUESTIONS]
    assert told["auto"]["ids"] == prompts
    answers = [bundle.tokenizer(answer.strip(), add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    expected = log_likelihoods(bundle.model, prompts, answers)
    assert [pair[0] for pair in told["auto"]["loglikelihood"]] == pytest.approx([sum(e) for e in expected], rel=1e-5)
    # Without a prompt, whatever the harness' own model would send.
    plain = [bundle.tokenizer(question)["input_ids"] for question in QUESTIONS]
    assert told["None"]["ids"] == plain
    starts = [[bundle.tokenizer.bos_token_id]] * len(QUESTIONS)
    whole = log_likelihoods(bundle.model, starts, plain)
    for prompt in ("auto", "None"):
        assert told[prompt]["rolling"] == pytest.approx([sum(e) for e in whole], rel=1e-5)


def test_pieces_are_not_the_whole(subwords: ModelBundle) -> None:
    """What the test above would miss with a tokenizer of whole words."""
    tokenizer, encoder = subwords.tokenizer, Encoder(subwords.tokenizer)
    for question in QUESTIONS:
        whole, pieces = tokenizer(f"<s>USER: {question} ASSISTANT: ")["input_ids"], encoder.prompt(question)
        assert whole != pieces
        assert tokenizer.decode(whole) == tokenizer.decode(pieces)


def test_its_score_is_ours(
    run_job: Callable[..., Path], harness: Callable[..., str], outputs: Path, tmp_path: Path
) -> None:
    folder = run_job("model=tiny_lm", "data=digits_text", *LEARNING, data=DATA) / "model"
    source, prepared = data_of("digits_text", outputs)
    ours = score(load_bundle(folder), source, prepared, "test", "test")
    about = write_task(tmp_path / "task", "digits_text", source, prepared)
    harness(
        "lm-eval", "-m", "ders.harness.lm_eval", "run", "--model", "ders",
        "--model_args", f"pretrained={folder},prompt=auto", "--tasks", about["task"],
        "--include_path", str(tmp_path / "task"), "--batch_size", "64", "--device", "cpu",
        "--output_path", str(tmp_path / "results"), "--log_samples",
    )  # fmt: skip
    (results,) = (tmp_path / "results").rglob("results*.json")
    theirs = json.loads(results.read_text())["results"][about["task"]]["exact_match,none"]
    assert 0.05 < theirs < 0.95
    assert theirs == pytest.approx(ours.metrics["test/accuracy"]["value"], abs=1e-12)
    (samples,) = (tmp_path / "results").rglob("samples*.jsonl")
    answers = [json.loads(line)["filtered_resps"][0] for line in samples.read_text().splitlines()]
    assert answers == [item["prediction"] for item in ours.predictions]
