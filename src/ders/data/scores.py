"""What a generated answer is worth: the definitions of the benchmarks, each in one place.

All values lie between 0 and 1.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Items = list[dict[str, Any]]

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)
# A contraction that lacks one apostrophe; the official table has one entry the wrong way round.
_MENDED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalize(answer: str) -> str:
    """Lower case, one blank between words and none around signs, no final full stop."""
    return re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(answer.lower().split())).removesuffix(".")


def is_correct(prediction: str, answer: str) -> bool:
    """Exact match after `normalize`."""
    return normalize(prediction) == normalize(answer)


def vqa_normalize(answer: str) -> str:
    """The normalisation of the official VQA v2 evaluation.

    A sign goes where a blank touches it or the text holds a number like 1,000, else it becomes a blank; a full stop
    goes unless a digit follows. Then lower case, number words up to ten as digits (`none` is 0), no articles, and the
    apostrophe of a contraction put back.
    """
    text = " ".join(re.split(r"[\n\t]", answer)).strip()
    number = re.search(r"\d,\d", text) is not None
    plain = text
    for sign in _SIGNS:
        touched = f"{sign} " in text or f" {sign}" in text
        plain = plain.replace(sign, "" if touched or number else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = [_DIGITS.get(word, word) for word in plain.lower().split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, annotations: Sequence[str]) -> float:
    """Soft accuracy of VQA v2, also VizWiz's and TextVQA's: min(n/3, 1), n people out of all but one having said it,
    averaged over who is left out (ten people as a rule).

    Prediction and annotations are both normalised, always; the official code leaves unanimous annotations as they are.
    """
    said = vqa_normalize(prediction)
    agreeing = [vqa_normalize(annotation) == said for annotation in annotations]
    return sum(min((sum(agreeing) - own) / 3, 1.0) for own in agreeing) / len(agreeing)


def open_recall(prediction: str, answer: str) -> float:
    """Recall of the words of an open medical answer, as LLaVA-Med and Med-MoE compute it, after `vqa_normalize`.

    tp / (tp + fn), where tp counts each occurrence *in the prediction* of a word that the answer has, and fn the
    answer's words that the prediction lacks: a prediction that repeats itself is credited for it, as in their code.
    """
    predicted, expected = (Counter(vqa_normalize(text).split()) for text in (prediction, answer))
    found = sum(count for word, count in predicted.items() if word in expected)
    lacking = sum(count for word, count in expected.items() if word not in predicted)
    return found / (found + lacking) if found else 0.0


def closed_accuracy(prediction: str, answer: str) -> float:
    """1 where the answer's string occurs in the prediction, letter case aside: Med-MoE's measure of closed questions.

    So "no" is found in "normal" too.
    """
    return float(answer.lower() in prediction.lower())


def says_no(prediction: str) -> bool:
    """POPE's reading of an answer: no, if its first sentence holds the word "no" or "not"; else yes."""
    words = prediction.split(".")[0].replace(",", "").lower().split()
    return bool({"no", "not"} & set(words))


def pope(items: Items) -> dict[str, float]:
    """POPE: F1 of "yes", which is the figure reported; beside it accuracy, precision, recall and the share of "yes"."""
    import torch
    from torchmetrics.functional.classification import (  # slow to import, and needed for this alone
        binary_accuracy,
        binary_f1_score,
        binary_precision,
        binary_recall,
    )

    predicted, expected = (torch.tensor([not says_no(item[key]) for item in items]) for key in ("prediction", "answer"))
    measures = {
        "pope": binary_f1_score,
        "pope_accuracy": binary_accuracy,
        "pope_precision": binary_precision,
        "pope_recall": binary_recall,
    }
    values = {name: float(measure(predicted.int(), expected.int())) for name, measure in measures.items()}
    return {**values, "pope_yes": float(predicted.float().mean())}


def chosen_option(text: str, question: str) -> str | None:
    """The letter of the option that an answer names: by its letter, by "the answer is B", or by the option's own text.

    Options are lines `A. text` of the question. None where it names none.
    """
    options = dict(re.findall(r"^\(?([A-Z])[.):]\s*(.+?)\s*$", question, re.MULTILINE))
    alone = re.match(r"\(?([A-Z])\)?(?:[.:,]|\)|\s*$)", text.strip())
    told = alone or re.search(r"answer is:?\s*\(?([A-Z])\b", text)
    if told is not None and (not options or told[1] in options):
        return told[1]
    return next((letter for letter, option in options.items() if is_correct(text, option)), None)


def science_qa(prediction: str, answer: str, question: str) -> float:
    """ScienceQA: 1 where prediction and answer name the same option; an answer that names none is wrong."""
    expected = chosen_option(answer, question)
    if expected is None:
        return float(is_correct(prediction, answer))
    return float(chosen_option(prediction, question) == expected)


def _mean(name: str, value: Callable[[dict[str, Any]], float]) -> Callable[[Items], dict[str, float]]:
    return lambda items: {name: sum(value(item) for item in items) / len(items)}


# From the items of one question kind to its scores; the one under the scorer's own name is the figure to report.
SCORERS: dict[str, Callable[[Items], dict[str, float]]] = {
    "exact": _mean("exact", lambda item: is_correct(item["prediction"], item["answer"])),
    "vqa": _mean(
        "vqa", lambda item: vqa_accuracy(item["prediction"], item.get("annotations") or [item["answer"]] * 10)
    ),
    "open_recall": _mean("open_recall", lambda item: open_recall(item["prediction"], item["answer"])),
    "closed_accuracy": _mean("closed_accuracy", lambda item: closed_accuracy(item["prediction"], item["answer"])),
    "science_qa": _mean("science_qa", lambda item: science_qa(item["prediction"], item["answer"], item["question"])),
    "pope": pope,
}
