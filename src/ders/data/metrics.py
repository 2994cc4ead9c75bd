"""Scores of generated answers, and what is reached without looking at the image."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ders.data.loading import single_questions
from ders.data.scores import SCORERS, is_correct


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


def summarize(
    items: list[dict[str, Any]], prefix: str, scorers: Mapping[str, str] | None = None
) -> dict[str, dict[str, float | int]]:
    """`prefix/accuracy` (exact match) and `prefix/prior`, overall and per question kind, each with its sample count.

    With scorers also `prefix/<scorer>/<kind>`, and `prefix/score`: the plain mean of these over the kinds that have a
    scorer, as the benchmarks' tables average.

    Args:
        items: each with `kind`, `answer`, `prediction` and `prior`, and what the scorers need.
        scorers: by question kind, as `DataSource.scorers`.
    """
    groups: dict[str, list[dict[str, Any]]] = {"": items}
    for kind in sorted({item["kind"] for item in items}):
        groups[f"/{kind}"] = [item for item in items if item["kind"] == kind]
    scores: dict[str, dict[str, float | int]] = {}
    for metric, field in [("accuracy", "prediction"), ("prior", "prior")]:
        for kind, group in groups.items():
            correct = sum(is_correct(item[field], item["answer"]) for item in group)
            scores[f"{prefix}/{metric}{kind}"] = {"value": correct / max(len(group), 1), "count": len(group)}
    groups.pop("")
    chosen = {kind: scorer for kind in groups if (scorer := scorer_of(kind[1:], scorers or {})) is not None}
    for kind, scorer in chosen.items():
        for name, value in SCORERS[scorer](groups[kind]).items():
            scores[f"{prefix}/{name}{kind}"] = {"value": value, "count": len(groups[kind])}
    if chosen:
        values = [scores[f"{prefix}/{scorer}{kind}"]["value"] for kind, scorer in chosen.items()]
        count = sum(len(groups[kind]) for kind in chosen)
        scores[f"{prefix}/score"] = {"value": sum(values) / len(values), "count": count}
    return scores


def scorer_of(kind: str, scorers: Mapping[str, str]) -> str | None:
    """The scorer of a question kind: that of the longest key which is the kind, fits it as a pattern, or begins it."""
    fitting = [key for key in scorers if fnmatchcase(kind, key) or kind.startswith(f"{key}_")]
    return scorers[max(fitting, key=len)] if fitting else None
