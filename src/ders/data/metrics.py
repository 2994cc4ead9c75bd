"""Scores of generated answers, and what is reached without looking at the image."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ders.data.loading import single_questions
from ders.data.scores import SCORERS, is_correct


class MajorityPrior:
    """Answers each question by the commonest answer to the same words in the training split: the image unseen.

    A question never met is answered by the commonest answer of its kind; of a kind never met, by that of all kinds with
    the same last part (open, closed); else by the commonest of all. Of equally common answers the first met counts.

    Args:
        rows: of the training split; read one by one, and more than once.
        asked: the questions that will be answered: no others are counted.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], asked: Iterable[str]) -> None:
        by_question: dict[str, Counter[str]] = {question: Counter() for question in asked}
        # Long answers are mostly met once: of a million of them, hashes and not texts are kept.
        by_kind: dict[str, Counter[int]] = defaultdict(Counter)
        for row in rows:
            for item in single_questions(row):
                if item["question"] in by_question:
                    by_question[item["question"]][item["answer"]] += 1
                by_kind[item["kind"]][hash(item["answer"])] += 1
        by_ending: dict[str, list[Counter[int]]] = defaultdict(list)
        for kind, counts in by_kind.items():
            by_ending[_ending(kind)].append(counts)
        kinds = {kind: _commonest([counts]) for kind, counts in by_kind.items()}
        endings = {ending: _commonest(group) for ending, group in by_ending.items()}
        overall = _commonest(list(by_kind.values())) if by_kind else None
        texts = _texts(rows, {*kinds.values(), *endings.values()} | ({overall} if overall is not None else set()))
        self.by_question = {q: c.most_common(1)[0][0] for q, c in by_question.items() if c}
        self.by_kind = {kind: texts[key] for kind, key in kinds.items()}
        self.by_ending = {ending: texts[key] for ending, key in endings.items()}
        self.overall = "" if overall is None else texts[overall]

    def __call__(self, item: dict[str, Any]) -> str:
        kind = item["kind"]
        return self.by_question.get(
            item["question"], self.by_kind.get(kind, self.by_ending.get(_ending(kind), self.overall))
        )


def _ending(kind: str) -> str:
    return kind.rpartition("_")[2]


def _commonest(counts: list[Counter[int]]) -> int:
    merged = counts[0] if len(counts) == 1 else sum(counts, Counter())
    return merged.most_common(1)[0][0]


def _texts(rows: Iterable[dict[str, Any]], keys: set[int]) -> dict[int, str]:
    """The answers with these hashes."""
    found: dict[int, str] = {}
    for row in rows:
        found |= {key: answer for answer in row["answers"] if (key := hash(answer)) in keys}
        if len(found) == len(keys):
            break
    return found


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
