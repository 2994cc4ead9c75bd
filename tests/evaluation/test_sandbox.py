"""Programs that try: each is contained, tells nothing but values, and the next one is judged as ever."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from ders.evaluation import sandbox as sandbox_module
from ders.evaluation.judge import pack, unpack
from ders.evaluation.sandbox import Sandbox, SandboxError, bubblewrap


def programs(name: str) -> dict[str, str]:
    """What stands in a file of `hostile/`, by its headings."""
    text = Path(__file__).with_name("hostile").joinpath(f"{name}.txt").read_text()
    return dict(piece.split("\n", 1) for piece in text.split("\n=== ")[1:])


RIGHT = "def f(x):\n    return x + 1\n"
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n"


def judge(sandbox: Sandbox, program: str, check: str = CHECK) -> Any:
    return sandbox.judge(program, "f", "", check)


@pytest.fixture(scope="module")
def patient(sandbox: Sandbox) -> Sandbox:
    """For programs that end by themselves, however busy the machine is."""
    return Sandbox(20.0)


def leftovers() -> list[str]:
    """Command lines of processes of any sandbox."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "/judge.py" in line:
            found.append(line)
    return found


def all_gone(seconds: float = 5.0) -> bool:
    """Whether no process of a sandbox is left, soon: what held a gigabyte takes a moment to die."""
    deadline = time.monotonic() + seconds
    while leftovers() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not leftovers()


def test_right_and_wrong_programs(patient: Sandbox) -> None:
    right = judge(patient, RIGHT)
    assert (right.passed, right.reason, right.timed_out) == (True, "passed", False)
    wrong = judge(patient, "def f(x):\n    return 2\n")
    assert (wrong.passed, wrong.reason) == (False, "wrong answer")
    assert judge(patient, "def f(x:\n").reason.startswith("SyntaxError: ")
    assert judge(patient, "def g(x): pass").reason == "NameError: the program defines no function f"
    assert judge(patient, "def f(x):\n    return x + y").reason == "NameError: name 'y' is not defined"
    assert "no plain data" in judge(patient, "def f(x):\n    return object()").reason


def test_values_keep_their_types(patient: Sandbox) -> None:
    values: list[Any] = [
        None, True, 1, -(10**5000), 0.1, float("inf"), 1 + 2j, "é\ud800", b"\0", [1, [2]], (1, (2,)), {1, (2, 3)},
        frozenset({1}), {"a": [1], (1, 2): {None: 3}, 4: ()},
    ]  # fmt: skip
    sys.set_int_max_str_digits(0)
    for value in values:
        again = unpack(json.loads(json.dumps(pack(value))))
        assert (again, type(again)) == (value, type(value))
    program = "import collections\ndef f(kind):\n    return eval(kind, vars(collections))\n"
    cases = {
        "Counter('aab')": "{'a': 2, 'b': 1}",
        "namedtuple('P', 'x y')(1, 2)": "(1, 2)",
        "OrderedDict(a=[True])": "{'a': [True]}",
    }
    check = "def check(candidate):\n" + "".join(f"    assert candidate({k!r}) == {v}\n" for k, v in cases.items())
    check += "    assert candidate('range(3)') != [0, 1, 2] and list(candidate('map(str, [1])')) == ['1']\n"
    assert judge(patient, program, check).reason == "passed"


FAKES = programs("fakes")


@pytest.mark.parametrize("name", FAKES)
def test_no_pass_without_right_answers(sandbox: Sandbox, name: str) -> None:
    verdict = judge(sandbox, FAKES[name])
    assert not verdict.passed
    assert verdict.reason != "passed"
    assert verdict.seconds < sandbox.time_limit + sandbox_module._GRACE_SECONDS + 1
    assert all_gone()
    assert judge(sandbox, RIGHT).passed


def test_neither_token_nor_tests_are_in_the_program(patient: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module.secrets, "token_hex", lambda: "token-0f1e")
    check = "def check(candidate):\n    found = candidate(1)\n    assert found == [], found\n"
    assert judge(patient, FAKES["searching its memory for the token"], check).reason == "passed"


def test_reasons_name_what_happened(patient: Sandbox) -> None:
    assert judge(patient, FAKES["os._exit(0)"]).reason == "the program ended before it answered (exit code 0)"
    assert judge(patient, FAKES["sys.exit(0)"]).reason == "SystemExit: 0"
    assert judge(patient, FAKES["a segmentation fault"]).reason.endswith("(killed by SIGSEGV)")
    assert judge(patient, FAKES["10 GB"]).reason.startswith("MemoryError")
    assert judge(patient, FAKES["writing to every descriptor"]).reason == (
        "the program wrote into the channel of its answers"
    )


ATTEMPTS = programs("attempts")


@pytest.mark.parametrize("name", ATTEMPTS)
def test_nothing_is_reached(patient: Sandbox, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "SECRET")
    host = tmp_path / "host"
    host.write_text("untouched")
    python_at = Path(sandbox_module._python()).parts[1]
    allowed = ["dev", "tmp", "judge.py", "lib", "lib64", "usr", "etc", python_at]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        body = ATTEMPTS[name].replace("HOST", str(host)).replace("REPOSITORY", str(ROOT))
        body = body.replace("PORT", str(server.getsockname()[1])).replace("ALLOWED", repr(allowed))
        program = f"def f():\n    done = []\n{textwrap.indent(body, '    ')}    return done\n"
        verdict = judge(
            patient, program, "def check(candidate):\n    done = candidate()\n    assert done == [], done\n"
        )
        assert verdict.reason == "passed"
        with pytest.raises(BlockingIOError):
            server.accept()
    assert host.read_text() == "untouched"
    assert os.listdir(tmp_path) == ["host"]
    assert all_gone()
    assert judge(patient, RIGHT).passed


LOOPS = programs("loops")


@pytest.mark.parametrize("name", LOOPS)
def test_time_is_limited(name: str, sandbox: Sandbox) -> None:
    verdict = judge(sandbox, LOOPS[name])
    assert not verdict.passed
    assert verdict.timed_out is (name != "its pipes closed")
    assert verdict.seconds < sandbox.time_limit + sandbox_module._GRACE_SECONDS + 1
    assert all_gone()


def test_a_stopped_judge_is_ended_from_outside(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "_GRACE_SECONDS", 0.5)
    program = "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nwhile True: pass"
    verdict = judge(sandbox, program)
    assert (verdict.passed, verdict.timed_out, verdict.reason) == (False, True, "timed out")
    assert all_gone()


def test_the_others_are_judged_while_one_misbehaves(sandbox: Sandbox) -> None:
    programs = [RIGHT, LOOPS["fork bomb"], RIGHT, FAKES["ending all"], RIGHT, LOOPS["output flood"], RIGHT, RIGHT]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda program: judge(sandbox, program), programs))
    assert [verdict.passed for verdict in verdicts] == [program == RIGHT for program in programs]


def test_all_ends_with_the_process_that_started_it(sandbox: Sandbox) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", "from sandbox import Sandbox\ns = Sandbox(30.0)\nprint(1, flush=True)\n"
         "s.judge('while True: pass', 'f', '', '')"],
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT / "src" / "ders" / "evaluation")},
    )  # fmt: skip
    assert starter.stdout is not None
    starter.stdout.readline()
    deadline = time.monotonic() + 10
    # Judge and program: bubblewrap itself is bound to its parent by then.
    while sum("bwrap" not in line for line in leftovers()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert leftovers()
    starter.kill()
    starter.wait()
    assert all_gone()


def test_much_output_ends_the_command(tmp_path: Path) -> None:
    with open(os.devnull, "rb") as nothing:
        flood = [sys.executable, "-c", "while True: print('a' * 10000)"]
        output, _ = sandbox_module._run(flood, nothing, 20.0)
    assert output is not None
    assert len(output) < 3 * sandbox_module._OUTPUT_BYTES
    assert threading.active_count() < 50


@pytest.mark.parametrize("limit", [0, -1.0, float("inf"), "3", True, None])
def test_time_limits_are_checked(limit: Any) -> None:
    with pytest.raises(ValueError, match="time_limit must be"):
        Sandbox(limit)


def test_without_bubblewrap_there_is_no_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        Sandbox()


def test_a_sandbox_that_does_not_hold_is_refused(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    command = bubblewrap()
    leaky = [command[0], "--ro-bind", "/etc", "/etc", "--proc", "/proc", *command[1:]]
    monkeypatch.setattr(sandbox_module, "bubblewrap", lambda: leaky)
    with pytest.raises(SandboxError, match=r"does not contain.*files of the machine, the list of processes"):
        Sandbox()
    monkeypatch.setattr(sandbox_module, "bubblewrap", lambda: ["/bin/false"])
    with pytest.raises(SandboxError, match="gave no verdict"):
        Sandbox()
