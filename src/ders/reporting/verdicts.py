"""What the paper's own numbers, and what our runs, say of each of its claims."""

import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import mean
from typing import Any

import yaml

from ders.reporting.comparisons import Comparison, comparisons_of
from ders.reporting.noise import noise_of
from ders.reporting.paper import Key, Published
from ders.reporting.tables import Row

SUPPORTED, CONTRADICTED, UNDECIDED, NOT_RUN = "supported", "contradicted", "undecided", "not run"


@dataclass(frozen=True)
class Verdict:
    """A claim, the paper's printed numbers on it, and ours: each a word and the numbers behind it."""

    id: str
    claim: str
    where: str
    tables: list[str]
    held_to: str
    printed: str
    printed_because: str
    measured: str
    measured_because: str


@cache
def load_claims() -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = yaml.safe_load(files("ders.reporting").joinpath("claims.yaml").read_text())
    return loaded


def judge(claim: dict[str, Any], published: Published, ours: dict[Key, Row], cosines: list[float]) -> Verdict:
    """Both verdicts on one claim.

    Args:
        ours: every row of ours, of whatever claim.
        cosines: the smallest of each analysed run, for claims of similarity.
    """
    what = (claim["id"], claim["claim"], claim["where"], claim["tables"])
    if "not_printed" in claim:
        measured = _judge_cosines(claim, cosines) if "cosine_above" in claim else (NOT_RUN, "no run of ours tests it")
        held = f"every cosine above {claim['cosine_above']}" if "cosine_above" in claim else "nothing that was measured"
        return Verdict(*what, held, UNDECIDED, f"the paper gives {claim['not_printed']}", *measured)
    comparisons = comparisons_of(claim, published, ours)
    return Verdict(*what, _held_to(comparisons), *_judge_printed(comparisons), *_judge_measured(comparisons))


def word(comparison: Comparison, difference: float, noise: float) -> str:
    """Whether a difference, known to within the noise, is what is expected: never from less than the noise."""
    if math.isnan(noise):
        return UNDECIDED
    value = round(-difference if comparison.expect == "worse" else difference, 9)
    if comparison.expect == "not_worse":
        if value - noise >= -comparison.margin:
            return SUPPORTED
        return CONTRADICTED if value + noise < -comparison.margin else UNDECIDED
    if value - noise > comparison.margin:
        return SUPPORTED
    return CONTRADICTED if value + noise <= comparison.margin else UNDECIDED


def _judge_printed(comparisons: list[Comparison]) -> tuple[str, str]:
    judged, lower = [], []
    for comparison in comparisons:
        if comparison.printed is not None:
            found = word(comparison, comparison.printed, comparison.printed_noise)
            judged.append((found, f"{comparison.what} {_value(comparison, comparison.printed)}"))
            if comparison.expect == "not_worse" and found == SUPPORTED and round(comparison.printed, 1) < 0:
                lower.append(comparison.what)
    basis = ["From the printed digits."]
    if not all(comparison.quantity for comparison in comparisons):
        basis = ["Single runs, so how much is chance the paper cannot say."]
    if lower:
        basis.append(f"Lower, though within the margin: {'; '.join(lower)}.")
    return _together(judged, len(comparisons), basis)


def _judge_measured(comparisons: list[Comparison]) -> tuple[str, str]:
    tested = [comparison for comparison in comparisons if comparison.measurable]
    judged = []
    for comparison, noise in zip(tested, noise_of(tested), strict=True):
        if comparison.ours:
            middle = mean(comparison.ours)
            give = f"± {noise:.2f}"
            if comparison.exact:
                give = "exactly"
            elif math.isnan(noise):
                give = "noise unknown from one seed"
            judged.append((word(comparison, middle, noise), f"{comparison.what} {_value(comparison, middle)} {give}"))
    basis = _basis([comparison for comparison in tested if comparison.ours and not comparison.exact])
    for comparison in comparisons:
        if comparison.quantity and not comparison.measurable:
            basis.append(_sentence(f"{comparison.quantity.replace('_', ' ')} is not measured by our runs"))
    return _together(judged, len(tested), list(dict.fromkeys(basis)))


def _basis(by_chance: list[Comparison]) -> list[str]:
    """What the intervals of comparisons of ours rest on."""
    if not by_chance:
        return []
    seeds = sorted({len(comparison.ours) for comparison in by_chance})
    questions = [comparison.question for comparison in by_chance if comparison.quantity is None]
    text = f"± is half an interval from the spread over {' or '.join(map(str, seeds))} seeds"
    if len(by_chance) > 1:
        text += f", 95% for all {len(by_chance)} together"
    else:
        text += ", 95%"
    if questions:
        text += f", at least one question ({max(questions):.2f} points)"
    if max(seeds) < 3:
        text += "; so few seeds leave wide intervals"
    return [f"{text}."]


def _together(judged: list[tuple[str, str]], total: int, basis: list[str]) -> tuple[str, str]:
    """One word for all comparisons: a claim stands with all of them, and falls with one."""
    words = [found for found, _ in judged]
    if not words:
        return NOT_RUN, " ".join(["No comparison has both its rows with a score or a count.", *basis])
    counts = [f"{words.count(w)} {w}" for w in (SUPPORTED, CONTRADICTED, UNDECIDED) if w in words]
    counts += [f"{total - len(words)} {NOT_RUN}"] if len(words) < total else []
    whole = UNDECIDED
    if CONTRADICTED in words:
        whole = CONTRADICTED
    elif words == [SUPPORTED] * total:
        whole = SUPPORTED
    details = "; ".join(f"{text} ({found})" if len(set(words)) > 1 else text for found, text in judged)
    return whole, " ".join([f"{', '.join(counts)} of {total}: {details}.", *basis])


def _judge_cosines(claim: dict[str, Any], cosines: list[float]) -> tuple[str, str]:
    if not cosines:
        return NOT_RUN, "no trained model was analysed"
    smallest = min(cosines)
    return (
        SUPPORTED if smallest > claim["cosine_above"] else CONTRADICTED,
        f"the smallest cosine of the first and the last MoE layer is {smallest:.6f}, over {len(cosines)} runs",
    )


def _held_to(comparisons: list[Comparison]) -> str:
    """What the words of a claim were taken to mean."""
    meanings = []
    for comparison in comparisons:
        margin = comparison.margin
        meanings.append(
            {
                "not_worse": f"loses at most {margin:g} point{'s' if margin != 1 else ''}",
                "better": f"gains more than {margin:g} points" if margin else "scores higher",
                "worse": f"loses more than {margin:g} points" if margin else "scores lower",
                "smaller": f"saves more than {margin:g}%" if margin else "is smaller",
            }[comparison.expect]
        )
    return ", or ".join(dict.fromkeys(meanings))


def _value(comparison: Comparison, value: float) -> str:
    return f"{value:.1f}% less" if comparison.quantity else f"{value:+.2f}"


def verdicts_markdown(verdicts: list[Verdict], *, heading: str) -> str:
    """Claims with both verdicts on them."""
    lines = [heading, ""]
    for verdict in verdicts:
        lines += [
            f"- {verdict.claim} ({verdict.where}; held to: {verdict.held_to})",
            f"  - printed: **{verdict.printed}**. {_sentence(verdict.printed_because)}",
            f"  - ours: **{verdict.measured}**. {_sentence(verdict.measured_because)}",
        ]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")
