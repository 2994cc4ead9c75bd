"""Real Python functions with docstrings: the code task in miniature."""

import ast
import functools
import importlib.metadata
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ders.data.faults import DataError
from ders.data.humaneval import read_problems
from ders.data.source import WrittenSource, conversation, write_rows

STANDARD_LIBRARY = "python"
# Tests, old compilers and demonstrations are not what one would want to learn from.
_LEFT_OUT = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|site-packages|lib2to3|idlelib|turtledemo|conftest\.py|_?test.*)(/|$)"
)
_SHINGLE = 10  # words in a row that count as resemblance


@dataclass(frozen=True)
class Function:
    """A function cut from a file.

    Attributes:
        name, place: its name, and the file it is from.
        prompt: signature and docstring, as they stand there.
        body: what follows the docstring.
        statements: of the body, parsed.
    """

    name: str
    place: str
    prompt: str
    body: str
    statements: Sequence[ast.stmt]

    @functools.cached_property
    def key(self) -> str:
        """The body without comments and layout: functions with equal keys are copies."""
        return "\n".join(map(ast.dump, self.statements))


@dataclass(kw_only=True)
class PythonFunctions(WrittenSource):
    """Functions with a docstring from the standard library and from installed packages: signature and docstring are
    the prompt, the body is the answer.

    Splits are made of whole packages, so what is tested comes from packages never trained on. Of copies one is kept,
    the test split's before any other. What resembles a problem of HumanEval is left out: the same name, the same
    statements, or ten words of its docstring in a row. Licences and versions are written beside the rows.

    Attributes:
        train, val, test: packages of each split, by their import names; `python` is the standard library.
        num_train, num_val, num_test: use only so many, drawn; None for all.
        max_prompt_chars, max_body_chars: longer functions are left out.
        seed: which are drawn, and their order.
    """

    train: Sequence[str] = (STANDARD_LIBRARY,)
    val: Sequence[str] = ()
    test: Sequence[str] = ()
    num_train: int | None = None
    num_val: int | None = None
    num_test: int | None = None
    max_prompt_chars: int = 500
    max_body_chars: int = 400
    seed: int = 0
    prompt: str = "completion"
    scored_by: str = "likelihood"

    splits: ClassVar[tuple[str, ...]] = ("test", "val", "train")  # of copies, what is tested stays

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = [package for split in self.splits for package in getattr(self, split)]
        twice = sorted({package for package in chosen if chosen.count(package) > 1})
        if twice:
            raise ValueError(f"{self.dials}: {', '.join(twice)} is in two splits, and what is tested must be unseen")

    def content(self) -> dict[str, Any]:
        packages = [package for split in self.splits for package in getattr(self, split)]
        return super().content() | {"versions": {package: _version(package) for package in packages}}

    def write(self, folder: Path) -> dict[str, Any]:
        resembling = _Resembling()
        rng = np.random.default_rng(self.seed)
        seen: set[str] = set()
        sources = []
        for split in self.splits:
            rows = []
            for package in getattr(self, split):
                kept = []
                found = 0
                for function in functions_of(package):
                    found += 1
                    fits = len(function.prompt) <= self.max_prompt_chars and len(function.body) <= self.max_body_chars
                    if fits and function.key not in seen and not resembling(function):
                        seen.add(function.key)
                        kept.append(_row(package, function))
                rows += kept
                about = {"package": package, "version": _version(package), "licence": _licence(package)}
                sources.append({"split": split, **about, "functions": found, "kept": len(kept)})
            order = rng.permutation(len(rows))[: getattr(self, f"num_{split}")]
            write_rows(folder / f"{split}.json", [rows[i] for i in order])
        (folder / "sources.json").write_text(json.dumps(sources, indent=1))
        return {}


def functions_of(package: str) -> Iterator[Function]:
    """The functions with a docstring and a body on the top level of a package's modules, file by file.

    Raises:
        DataError: it is not installed.
    """
    root = _root(package)
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root).as_posix()
        if not _LEFT_OUT.search(place):
            yield from _functions_in(file, place)


def _functions_in(file: Path, place: str) -> Iterator[Function]:
    try:
        text = file.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return  # templates, and files that are meant to be broken
    lines = text.splitlines(keepends=True)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or ast.get_docstring(node) is None:
            continue
        told, first = node.body[0], node.body[1]
        end = told.end_lineno or 0
        if first.lineno <= end or told.lineno == node.lineno:
            continue  # on one line
        prompt, body = "".join(lines[node.lineno - 1 : end]), "".join(lines[end : node.end_lineno])
        yield Function(node.name, place, prompt, body.strip("\n") + "\n", node.body[1:])


def _row(package: str, function: Function) -> dict[str, Any]:
    turns = [(package.lower(), function.prompt, function.body)]
    return {"id": f"{package}/{function.place}:{function.name}", **conversation(turns, image=False)}


class _Resembling:
    """Whether a function resembles a problem of HumanEval."""

    def __init__(self) -> None:
        problems = read_problems()
        self.names = {problem["entry_point"] for problem in problems}
        solutions = [ast.parse(problem["prompt"] + problem["canonical_solution"]).body[-1] for problem in problems]
        self.keys = {"\n".join(map(ast.dump, solution.body[1:])) for solution in solutions}  # type: ignore[attr-defined]
        self.shingles = {shingle for problem in problems for shingle in _shingles(problem["prompt"])}

    def __call__(self, function: Function) -> bool:
        return (
            function.name in self.names
            or function.key in self.keys
            or not self.shingles.isdisjoint(_shingles(function.prompt))
        )


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + _SHINGLE]) for i in range(len(words) - _SHINGLE + 1)}


def _root(package: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"data=python_functions reads the package {package}, which is not installed")
    return Path(spec.submodule_search_locations[0])


def _distribution(package: str) -> importlib.metadata.Distribution:
    names = importlib.metadata.packages_distributions().get(package)
    if not names:
        raise DataError(f"data=python_functions reads the package {package}, which is not installed")
    return importlib.metadata.distribution(names[0])


def _version(package: str) -> str:
    return platform.python_version() if package == STANDARD_LIBRARY else _distribution(package).version


def _licence(package: str) -> str:
    if package == STANDARD_LIBRARY:
        return "PSF-2.0"
    about = _distribution(package).metadata
    classifiers = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License")]
    told = about["License-Expression"] or "; ".join(classifiers) or about["License"] or "not stated"
    return told.strip().splitlines()[0]
