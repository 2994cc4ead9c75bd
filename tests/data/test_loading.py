from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from ders.data.conversation import IGNORED, Encoder
from ders.data.loading import Conversations, PixelReader, Questions, collate_conversations, collate_questions
from ders.data.metrics import MajorityPrior, is_correct, summarize
from ders.data.rows import DataError
from ders.models.bundle import ModelBundle

ROWS = Dataset.from_list(
    [
        {"id": "a", "image": "a.png", "questions": ["<image>\nwhat is it?", "it is?"], "answers": ["7", "what"]}
        | {"kinds": ["open", "open"]},
        {"id": "b", "image": None, "questions": ["what?"], "answers": ["7"], "kinds": ["closed"]},
    ]
)


@pytest.fixture
def encoder(llava_model: ModelBundle) -> Encoder:
    return Encoder(llava_model.tokenizer, llava_model.image_tokens)


@pytest.fixture
def pixels(tmp_path: Path, llava_model: ModelBundle) -> PixelReader:
    from PIL import Image

    Image.new("L", (16, 16), 99).save(tmp_path / "a.png")
    return PixelReader(tmp_path, llava_model.pixel_reader)


def test_only_answers_carry_labels(encoder: Encoder) -> None:
    ids, labels = encoder.conversation(ROWS[0]["questions"], ROWS[0]["answers"])
    text = encoder.tokenizer.decode(ids)
    assert text == (
        "<s> USER : <image> <image> <image> <image> what is it ? ASSISTANT : 7 </s> "
        "USER : it is ? ASSISTANT : what </s>"
    )
    kept = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert encoder.tokenizer.decode(kept) == "7 </s> what </s>"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_the_prompt_is_the_prefix_training_saw(encoder: Encoder) -> None:
    prompt = encoder.prompt("<image>\nwhat is it?")
    ids, labels = encoder.conversation(["<image>\nwhat is it?"], ["7"])
    assert ids[: len(prompt)] == prompt
    assert [label == IGNORED for label in labels] == [True] * len(prompt) + [False, False]


def test_batches_mix_images_and_text(encoder: Encoder, pixels: PixelReader, llava_model: ModelBundle) -> None:
    data = Conversations(ROWS, encoder, pixels)
    batch = collate_conversations([data[0], data[1]], pad_id=0)
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert batch["attention_mask"].sum(1).tolist() == [len(data[0]["ids"]), len(data[1]["ids"])]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    loss = llava_model.model(**batch).loss
    singles = [collate_conversations([data[i]], 0) for i in (0, 1)]
    counts = torch.tensor([float((s["labels"] >= 0).sum()) for s in singles])
    apart = torch.stack([llava_model.model(**single).loss for single in singles])
    torch.testing.assert_close(loss, (apart * counts).sum() / counts.sum())
    assert "pixel_values" not in collate_conversations([data[1]], 0)


def test_every_turn_is_asked_alone(encoder: Encoder, pixels: PixelReader) -> None:
    questions = Questions(ROWS, encoder, pixels)
    assert [item["question"] for item in questions.items] == ["<image>\nwhat is it?", "<image>\nit is?", "what?"]
    batch = collate_questions([questions[i] for i in range(3)], pad_id=0)["inputs"]
    assert batch["pixel_values"].shape[0] == 2
    assert (batch["attention_mask"][:, -1] == 1).all()  # padded on the left


def test_a_text_model_refuses_images() -> None:
    with pytest.raises(DataError, match="this model reads only text"):
        PixelReader(Path("."), None).read("a.png")


@pytest.mark.parametrize(
    ("prediction", "answer", "correct"),
    [
        ("Yes.", "yes", True),
        (" 7 ", "7", True),
        ("17", "7", False),
        ("a  Dog", "A dog.", True),
        ("", "7", False),
        ("yes .", "yes.", True),
        ("3 . 5", "3.5", True),
        ("it ' s", "it's", True),
    ],
)
def test_exact_match(prediction: str, answer: str, correct: bool) -> None:
    assert is_correct(prediction, answer) is correct


def answered(kind: str, question: str, *answers: str) -> dict[str, Any]:
    n = len(answers)
    return {"id": "", "image": None, "questions": [question] * n, "answers": answers, "kinds": [kind] * n}


def test_the_prior_sees_the_question_alone() -> None:
    rows = [answered("k", "how many?", "2", "3", "3"), answered("k", "any?", "no", "no", "no", "no")]
    prior = MajorityPrior(rows, ["how many?", "never asked"])
    assert prior({"question": "how many?", "kind": "k"}) == "3"
    assert prior({"question": "never asked", "kind": "k"}) == "no"
    assert list(prior.by_question) == ["how many?"]  # what nobody asks is not kept


def test_the_prior_of_a_kind_that_training_has_not() -> None:
    rows = [
        answered("open", "where?", "left", "right", "right"),
        answered("slake_open", "where?", "left", "left", "lung"),
        answered("closed", "is it?", "yes", "yes", "no", "no", "yes"),
        answered("slake_closed", "is it?", "no", "no", "no"),
    ]
    prior = MajorityPrior(rows, [])
    told = {
        "open": "right",
        "slake_open": "left",
        "vqa_rad_open": "left",  # 3 of open and slake_open together
        "vqa_rad_closed": "no",  # 5 of both
        "pope": "no",  # 5 of all
    }
    assert {kind: prior({"question": "new", "kind": kind}) for kind in told} == told
    assert MajorityPrior([], ["new"])({"question": "new", "kind": "open"}) == ""


def test_of_equally_common_answers_the_prior_gives_the_first() -> None:
    prior = MajorityPrior([answered("k", "q", "b", "a", "a", "b", "c")], ["q"])
    assert [prior({"question": question, "kind": "k"}) for question in ("q", "new")] == ["b", "b"]


def test_scores_carry_their_counts() -> None:
    items = [
        {"kind": "open", "answer": "7", "prediction": "7", "prior": "1"},
        {"kind": "open", "answer": "8", "prediction": "7", "prior": "1"},
        {"kind": "closed", "answer": "yes", "prediction": "no", "prior": "Yes"},
    ]
    scores = summarize(items, "test")
    assert scores["test/accuracy"] == {"value": 1 / 3, "count": 3}
    assert scores["test/accuracy/open"] == {"value": 0.5, "count": 2}
    assert scores["test/prior/closed"] == {"value": 1.0, "count": 1}
