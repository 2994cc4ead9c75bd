"""Each score against cases worked out by hand from its definition."""

import pytest

from ders.data.metrics import scorer_of, summarize
from ders.data.scores import (
    SCORERS,
    chosen_option,
    closed_accuracy,
    open_recall,
    pope,
    science_qa,
    vqa_accuracy,
    vqa_normalize,
)


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("x-ray", "x ray"),  # no blank touches the sign: it becomes one
        ("x -ray", "x ray"),
        ("red/ blue", "red blue"),  # a blank touches it: it goes
        ("1,000", "1000"),  # a number with a comma: signs go without a blank
        ("3.5 m.", "3.5 m"),
        ("U.S.", "us"),
        ("isnt a dog", "isn't dog"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the official table's own slip
        ("yes\nno", "yes no"),
        ("it's", "it's"),
    ],
)
def test_vqa_normalization(answer: str, normalized: str) -> None:
    assert vqa_normalize(answer) == normalized


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # n of ten agree: leaving out one of them n-1 remain, leaving out another n.
    [
        (0, 0.0),
        (1, 0.9 / 3),
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7 * 1) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_vqa_soft_accuracy(agreeing: int, expected: float) -> None:
    annotations = ["The dog"] * agreeing + [f"cat {i}" for i in range(10 - agreeing)]
    assert vqa_accuracy("dog.", annotations) == pytest.approx(expected)


def test_vqa_without_annotations_takes_the_one_answer() -> None:
    items = [{"prediction": "Two.", "answer": "2"}, {"prediction": "3", "answer": "2"}]
    assert SCORERS["vqa"](items) == {"vqa": 0.5}
    assert SCORERS["vqa"]([items[1] | {"annotations": ["3"] * 2 + ["2"] * 8}]) == {"vqa": pytest.approx(0.6)}


@pytest.mark.parametrize(
    ("prediction", "answer", "recall"),
    [
        ("in the left upper lobe", "left upper lobe", 1.0),
        ("left lung", "left upper lobe", 1 / 3),
        ("left left", "left lobe", 2 / 3),  # a repeated word counts each time: 2 found, 1 lacking
        ("the right", "left", 0.0),
        ("", "left", 0.0),
        ("a the", "left", 0.0),
        ("Two lesions.", "2 lesions", 1.0),
    ],
)
def test_open_recall(prediction: str, answer: str, recall: float) -> None:
    assert open_recall(prediction, answer) == pytest.approx(recall)


@pytest.mark.parametrize(
    ("prediction", "answer", "value"),
    [("Yes, it is.", "yes", 1), ("No", "yes", 0), ("It is normal", "no", 1), ("", "no", 0), ("CT", "ct", 1)],
)
def test_closed_accuracy(prediction: str, answer: str, value: int) -> None:
    assert closed_accuracy(prediction, answer) == value


def test_pope() -> None:
    told = ["Yes.", "yes, there is", "No.", "There is not one", "No, but. Yes.", "Yes. Not sure."]
    true = ["yes", "no", "no", "yes", "yes", "yes"]
    # Read as yes yes no no no yes: 2 true positives, 1 false, 2 missed, 1 true negative.
    values = pope([{"prediction": p, "answer": a} for p, a in zip(told, true, strict=True)])
    precision, recall = 2 / 3, 2 / 4
    assert values == {
        "pope": pytest.approx(2 * precision * recall / (precision + recall)),
        "pope_accuracy": pytest.approx(3 / 6),
        "pope_precision": pytest.approx(precision),
        "pope_recall": pytest.approx(recall),
        "pope_yes": pytest.approx(3 / 6),
    }


QUESTION = "<image>\nWhich is the largest?\nA. a dog\nB. an elephant\nC. it\nAnswer with the option's letter."


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B. an elephant", "B"),
        ("The answer is B.", "B"),
        ("An Elephant.", "B"),
        ("A dog", "A"),  # not the letter A: the text of option A
        ("D", None),
        ("elephants", None),
        ("", None),
    ],
)
def test_chosen_option(text: str, letter: str | None) -> None:
    assert chosen_option(text, QUESTION) == letter


def test_science_qa() -> None:
    assert science_qa("an elephant", "B", QUESTION) == 1
    assert science_qa("A", "B", QUESTION) == 0
    assert science_qa("perhaps", "B", QUESTION) == 0
    assert science_qa("Paris", "paris", "Which city?") == 1  # no options: the words themselves


def test_the_longest_key_that_fits_a_kind() -> None:
    scorers = {"*": "exact", "vqa_rad": "open_recall", "vqa_rad_closed": "closed_accuracy", "*_test": "vqa"}
    assert scorer_of("vqa_rad_open", scorers) == "open_recall"
    assert scorer_of("vqa_rad_closed", scorers) == "closed_accuracy"
    assert scorer_of("vqa_radical", scorers) == "exact"
    assert scorer_of("my_test", scorers) == "vqa"
    assert scorer_of("x", {"y": "exact"}) is None


def test_scores_stand_beside_the_accuracy_and_are_averaged_over_kinds() -> None:
    def item(kind: str, answer: str, prediction: str) -> dict[str, str]:
        return {"kind": kind, "answer": answer, "prediction": prediction, "prior": "no"}

    items = [
        item("rad_open", "left lobe", "left"),
        item("rad_closed", "no", "no it is not"),
        item("rad_closed", "no", "yes"),
        item("rad_closed", "yes", "yes"),
        item("other", "1", "1"),
    ]
    plain = summarize(items, "test")
    scored = summarize(items, "test", {"rad_open": "open_recall", "*_closed": "closed_accuracy"})
    assert {key: scored[key] for key in plain} == plain
    assert {key: scored[key] for key in scored.keys() - plain.keys()} == {
        "test/open_recall/rad_open": {"value": 0.5, "count": 1},
        "test/closed_accuracy/rad_closed": {"value": 2 / 3, "count": 3},
        "test/score": {"value": (0.5 + 2 / 3) / 2, "count": 4},
    }
    assert summarize(items, "test", {"nothing_here": "exact"}) == plain
