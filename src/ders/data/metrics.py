"""Scores of generated answers, and what is reached without looking at the image."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from ders.data.loading import single_questions


def normalize(answer: str) -> str:
    """Lower case, one blank between words and none around signs, no final full stop."""
    return re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(answer.lower().split())).removesuffix(".")


def is_correct(prediction: str, answer: str) -> bool:
    """Exact match after `normalize`."""
    return normalize(prediction) == normalize(answer)


class MajorityPrior:
    """Answers each question by the commonest answer to the same words in the training split: the image unseen.

    A question never met is answered by the commonest answer of its kind.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        by_question: dict[str, Counter[str]] = defaultdict(Counter)
        by_kind: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            for item in single_questions(row):
                by_question[item["question"]][item["answer"]] += 1
                by_kind[item["kind"]][item["answer"]] += 1
        self.by_question = {q: c.most_common(1)[0][0] for q, c in by_question.items()}
        self.by_kind = {k: c.most_common(1)[0][0] for k, c in by_kind.items()}

    def __call__(self, item: dict[str, Any]) -> str:
        return self.by_question.get(item["question"], self.by_kind.get(item["kind"], ""))


def summarize(items: list[dict[str, Any]], prefix: str) -> dict[str, dict[str, float | int]]:
    """`prefix/accuracy` and `prefix/prior`, overall and per question kind, each with its sample count.

    Args:
        items: each with `kind`, `answer`, `prediction` and `prior`.
    """
    groups: dict[str, list[dict[str, Any]]] = {"": items}
    for kind in sorted({item["kind"] for item in items}):
        groups[f"/{kind}"] = [item for item in items if item["kind"] == kind]
    scores: dict[str, dict[str, float | int]] = {}
    for metric, field in [("accuracy", "prediction"), ("prior", "prior")]:
        for kind, group in groups.items():
            correct = sum(is_correct(item[field], item["answer"]) for item in group)
            scores[f"{prefix}/{metric}{kind}"] = {"value": correct / max(len(group), 1), "count": len(group)}
    return scores
