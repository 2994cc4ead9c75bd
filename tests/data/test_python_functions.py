"""Functions cut from packages: what is taken, what is left out, and that tests are unseen."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ders.data import PythonFunctions
from ders.data.faults import DataError
from ders.data.humaneval import read_problems
from ders.data.python_functions import functions_of

MODULE = '''
import functools

def add(a, b):
    """The sum."""
    # as one would
    return a + b

@functools.cache
def decorated(a):
    """Told.

    At length.
    """

    @functools.wraps(add)
    def inner(b):
        return a
    return inner

def untold(a):
    return a

def on_one_line(a): "told"; return a

def only_told(a):
    """Nothing else."""

class Thing:
    def method(self):
        """Not on the top level."""
        return 1
'''
COPY = '''
def sum_of(a, b):
    """Other words."""
    return a + b  # the very same statements
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes an installed package of files."""

    def make(name: str, **files: str) -> str:
        site = tmp_path / "site"
        (site / name).mkdir(parents=True)
        for stem, text in {"__init__": "", **files}.items():
            file = site / name / f"{stem}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        about = site / f"{name}-1.5.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.5\nLicense-Expression: MIT\n")
        (about / "top_level.txt").write_text(name)
        if str(site) not in sys.path:
            monkeypatch.syspath_prepend(str(site))
        return name

    return make


def test_what_is_a_function(package: Callable[..., str]) -> None:
    found = {function.name: function for function in functions_of(package("one_x", module=MODULE, broken="def f(:"))}
    assert set(found) == {"add", "decorated"}
    assert found["add"].prompt == 'def add(a, b):\n    """The sum."""\n'
    assert found["add"].body == "    # as one would\n    return a + b\n"
    assert found["decorated"].body.startswith("    @functools.wraps(add)\n    def inner(b):\n")
    for function in found.values():
        compile(function.prompt + function.body, "f", "exec")


def test_what_is_tested_is_unseen_and_no_copy_is_kept(package: Callable[..., str], tmp_path: Path) -> None:
    package("one_y", module=MODULE)
    package("two_y", other=COPY, **{"tests/test_it": MODULE.replace("add", "from_a_test")})
    prepared = PythonFunctions(train=["one_y"], test=["two_y"]).prepare(tmp_path)
    rows = {split: json.loads(Path(str(file)).read_text()) for split, file in prepared.files.items()}
    assert [row["id"] for row in rows["test"]] == ["two_y/other.py:sum_of"]
    assert [row["id"] for row in rows["train"]] == ["one_y/module.py:decorated"]  # `add` is the test's copy
    assert rows["val"] == []
    question, answer = (turn["value"] for turn in rows["test"][0]["conversations"])
    assert (question, answer) == (
        'def sum_of(a, b):\n    """Other words."""\n',
        "    return a + b  # the very same statements\n",
    )
    sources = json.loads((Path(str(prepared.files["test"])).parent / "sources.json").read_text())
    assert sources[0] == {
        "split": "test", "package": "two_y", "version": "1.5", "licence": "MIT", "functions": 1, "kept": 1,
    }  # fmt: skip


def test_nothing_resembles_humaneval(package: Callable[..., str], tmp_path: Path) -> None:
    problem = read_problems()[3]
    told = problem["prompt"].split('"""')[1].strip().splitlines()[0]
    body = problem["canonical_solution"].rstrip()
    text = "\n\n".join(
        [
            f'def {problem["entry_point"]}(a):\n    """Same name."""\n    return 1',
            f'def another(a):\n    """{told}"""\n    return 2',
            f'def third(operations):\n    """Same statements."""\n{body}',
            'def fourth(a):\n    """Of its own."""\n    return 4',
        ]
    )
    package("three_z", module=text)
    prepared = PythonFunctions(train=["three_z"]).prepare(tmp_path)
    rows = json.loads(Path(str(prepared.files["train"])).read_text())
    assert [row["id"] for row in rows] == ["three_z/module.py:fourth"]


def test_another_version_is_other_data(package: Callable[..., str], tmp_path: Path) -> None:
    package("four_z", module=MODULE)
    source = PythonFunctions(train=["four_z"])
    before = source.prepare(tmp_path)
    metadata = next((tmp_path / "site").glob("four_z-*/METADATA"))
    metadata.write_text(metadata.read_text().replace("1.5", "1.6"))
    assert source.prepare(tmp_path).files["train"] != before.files["train"]


def test_bad_dials() -> None:
    with pytest.raises(ValueError, match="networkx is in two splits"):
        PythonFunctions(train=["python", "networkx"], test=["networkx"])
    with pytest.raises(DataError, match="no_such_package_here, which is not installed"):
        PythonFunctions(train=["no_such_package_here"]).content()


def test_all_problems_are_there() -> None:
    problems = read_problems()
    assert len(problems) == 164
    assert problems[0]["task_id"] == "HumanEval/0"
    assert all(problem["entry_point"] in problem["prompt"] for problem in problems)
