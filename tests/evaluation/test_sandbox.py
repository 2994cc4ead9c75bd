"""Programs that try: each is contained, tells nothing but values, and the next one is judged as ever."""

import json
import os
import socket
import subprocess
import sys
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

RIGHT = "def f(x):\n    return x + 1\n"
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n"


def judge(sandbox: Sandbox, program: str, check: str = CHECK) -> Any:
    return sandbox.judge(program, "f", "", check)


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


def test_right_and_wrong_programs(sandbox: Sandbox) -> None:
    right = judge(sandbox, RIGHT)
    assert (right.passed, right.reason, right.timed_out) == (True, "passed", False)
    wrong = judge(sandbox, "def f(x):\n    return 2\n")
    assert (wrong.passed, wrong.reason) == (False, "wrong answer")
    assert judge(sandbox, "def f(x:\n").reason.startswith("SyntaxError: ")
    assert judge(sandbox, "def g(x): pass").reason == "NameError: the program defines no function f"
    assert judge(sandbox, "def f(x):\n    return x + y").reason == "NameError: name 'y' is not defined"
    assert "no plain data" in judge(sandbox, "def f(x):\n    return object()").reason


def test_values_keep_their_types(sandbox: Sandbox) -> None:
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
    assert judge(sandbox, program, check).reason == "passed"


# What each does; nothing of it may be a right answer.
FAKES = {
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "sys.exit(0) when called": "import sys\ndef f(x):\n    sys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "os._exit(0) when called": "import os\ndef f(x):\n    os._exit(0)",
    "printing": "print('passed')\nprint('{\"passed\": true}', flush=True)\ndef f(x):\n    return 'passed'",
    "atexit": "import atexit\natexit.register(lambda: 1 / 0)\natexit.register(print, 'passed')\ndef f(x):\n    raise SystemExit",
    "closing all streams": "import os\nos.closerange(0, 64)\ndef f(x):\n    return 2",
    "closing stdout": "import sys\nsys.stdout.close()\nsys.__stdout__.close()\ndef f(x):\n    return 2",
    "an object that equals everything": "class A:\n    __eq__ = lambda a, b: True\n    __hash__ = None\ndef f(x):\n    return A()",
    "an int that equals everything": "class A(int):\n    __eq__ = lambda a, b: True\ndef f(x):\n    return A(7)",
    "patched builtins": (
        "import builtins, json\nbuiltins.AssertionError = ValueError\nbuiltins.isinstance = lambda *_: True\n"
        "json.loads = json.dumps = lambda *a, **k: '{\"passed\": true}'\ndef f(x):\n    return 2"
    ),
    "writing to every descriptor": (
        "import os\nfor fd in range(64):\n    for _ in range(4):\n        try: os.write(fd, b'{\"passed\": true, \"reason\": \"passed\"}\\n')\n"
        "        except OSError: pass\ndef f(x):\n    return 2"
    ),
    "searching its memory for the token": (
        "import gc, re, sys\n"
        "def f(x):\n    frame = sys._getframe()\n    texts = []\n    while frame:\n        texts += [repr(v) for v in frame.f_locals.values()]\n"
        "        frame = frame.f_back\n    texts += [repr(o) for o in gc.get_objects() if isinstance(o, (str, bytes, dict))]\n"
        "    return [t[:99] for text in texts for t in re.findall('to' + 'ken-[0-9a-f]*|check' + '.candidate.:', text)]"
    ),
    "rewriting the tests it imports": "import sys\nsys.modules['__main__']._judge = lambda *_: None\ndef f(x):\n    return 2",
    "ending the judge": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef f(x):\n    return 2",
    "ending the first process": "import os, signal\nos.kill(1, signal.SIGKILL)\ndef f(x):\n    return 2",
    "ending all": "import os, signal\nos.kill(-1, signal.SIGKILL)\ndef f(x):\n    return 2",
    "an exception that escapes": "class E(BaseException):\n    def __str__(self): raise KeyboardInterrupt\ndef f(x):\n    raise E",
    "a segmentation fault": "import ctypes\ndef f(x):\n    ctypes.string_at(0)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return f([x])",
    "deep recursion outside Python": "def f(x):\n    for _ in range(10**5): x = [x]\n    return x",
    "an endless answer": "import itertools\ndef f(x):\n    return itertools.count()",
    "10 GB": "def f(x):\n    return len(bytearray(10 * 10**9))",
    "a large answer": "def f(x):\n    return 'a' * (600 << 20)",
}  # fmt: skip


@pytest.mark.parametrize("name", FAKES)
def test_no_pass_without_right_answers(sandbox: Sandbox, name: str) -> None:
    verdict = judge(sandbox, FAKES[name])
    assert not verdict.passed
    assert verdict.reason != "passed"
    assert verdict.seconds < sandbox.time_limit + sandbox_module._GRACE_SECONDS + 1
    assert all_gone()
    assert judge(sandbox, RIGHT).passed


def test_neither_token_nor_tests_are_in_the_program(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module.secrets, "token_hex", lambda: "token-0f1e")
    check = "def check(candidate):\n    found = candidate(1)\n    assert found == [], found\n"
    assert judge(sandbox, FAKES["searching its memory for the token"], check).reason == "passed"


def test_reasons_name_what_happened(sandbox: Sandbox) -> None:
    assert judge(sandbox, FAKES["os._exit(0)"]).reason == "the program ended before it answered (exit code 0)"
    assert judge(sandbox, FAKES["sys.exit(0)"]).reason == "SystemExit: 0"
    assert judge(sandbox, FAKES["a segmentation fault"]).reason.endswith("(killed by SIGSEGV)")
    assert judge(sandbox, FAKES["10 GB"]).reason.startswith("MemoryError")
    assert judge(sandbox, FAKES["writing to every descriptor"]).reason == (
        "the program wrote into the channel of its answers"
    )


# A body of f() that returns what it achieved: nothing, or only what is listed.
ATTEMPTS = {
    "network": """
    import socket
    for kind, address in ((socket.SOCK_STREAM, ("1.1.1.1", 53)), (socket.SOCK_DGRAM, ("1.1.1.1", 53)),
                          (socket.SOCK_STREAM, ("127.0.0.1", PORT))):
        with socket.socket(socket.AF_INET, kind) as s:
            s.settimeout(0.2)
            try: s.connect(address); s.send(b"x"); done.append(address)
            except OSError: pass
    done += [name for _, name in socket.if_nameindex() if name != "lo"]""",
    "processes": """
    import ctypes, multiprocessing, os, subprocess, threading
    attempts = [os.fork, lambda: os.posix_spawn("/usr/bin/env", ["env"], {}), lambda: subprocess.run(["true"]),
                lambda: threading.Thread(target=print).start(), lambda: multiprocessing.Process(target=print).start()]
    for attempt in attempts:
        try: attempt(); done.append(repr(attempt))
        except (OSError, RuntimeError): pass
    libc = ctypes.CDLL(None)
    for call in ("fork", "vfork"):
        if getattr(libc, call)() != -1: done.append(call)
    for flags in (0x10000000, 0x20000, 0x40000000):
        if libc.unshare(flags) != -1: done.append(flags)
    for call in ((29, 0, 4096, 0o1666), (319, b"x", 0)):
        if os.uname().machine == "x86_64" and libc.syscall(*call) != -1: done.append(call)
    if libc.ptrace(16, os.getppid(), 0, 0) != -1: done.append("ptrace")""",
    "daemons": """
    import os, time
    try:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                while True: time.sleep(1)
            os._exit(0)
        done.append("fork")
    except OSError: pass""",
    "writing": """
    import os, sys
    places = ["/", "/dev", "/dev/shm", "/usr/lib", "/root", "/var/tmp", "/judge.py", os.path.dirname(os.__file__), "HOST"]
    for place in places:
        for path in (place, place + "/written"):
            for attempt in (lambda: open(path, "a").write("x"), lambda: os.mkdir(path), lambda: os.remove(path),
                            lambda: os.rename("/judge.py", path), lambda: os.chmod(path, 0o777)):
                try: attempt(); done.append(path)
                except OSError: pass""",
    "filling /tmp": """
    written = 0
    try:
        for number in range(1000):
            with open(f"/tmp/{number}", "wb") as file: written += file.write(bytes(8 << 20))
    except OSError: pass
    if not 32 << 20 < written <= 64 << 20: done.append(written)
    try:
        with open("/tmp/0", "wb") as file:
            for _ in range(100): file.write(bytes(1 << 20))
        done.append("a large file")
    except OSError: pass""",
    "environment": """
    import os, sys
    done += sorted(set(os.environ) - {"PWD", "LC_CTYPE", "PYTHONHASHSEED"})
    done += [a for a in sys.argv if a != "solution"]
    if os.getuid() == 0 or os.getgid() == 0 or "SECRET" in repr(os.environ): done.append(os.getuid())
    if os.uname().nodename != "sandbox": done.append(os.uname().nodename)""",
    "reading": """
    import os
    for path in ("/etc/shadow", "/etc/passwd", "/proc/self/environ", "/proc/1/environ", "/sys", "/home", "/root/.ssh",
                 "/var", "/run", "HOST", "REPOSITORY", "REPOSITORY/pyproject.toml", "/dev/mem", "/dev/sda", "/dev/kmsg"):
        for attempt in (os.listdir, open):
            try: attempt(path); done.append(path)
            except OSError: pass
    done += [name for name in os.listdir("/") if name not in ALLOWED]
    done += os.listdir("/tmp")""",
    "symlinks": """
    import os
    for target in ("/etc/passwd", "HOST", "/", "/proc/1/root", "/dev/shm", "../../HOST"):
        link = f"/tmp/{len(done)}-link"
        os.symlink(target, link)
        for attempt in (lambda: open(link).read(), lambda: open(link, "w").write("x"),
                        lambda: open(link + "/etc/passwd").read(), lambda: open(link + "/x", "w").write("x"),
                        lambda: os.link("/judge.py", "/tmp/hard")):
            try: attempt(); done.append(target)
            except OSError: pass
        os.remove(link)""",
    "priority and limits": """
    import os, resource
    for attempt in (lambda: os.nice(-5), lambda: os.setuid(0), lambda: os.chroot("/tmp"),
                    lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
                    lambda: resource.setrlimit(resource.RLIMIT_NPROC, (-1, -1))):
        try: attempt(); done.append("granted")
        except (OSError, ValueError): pass""",
}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_nothing_is_reached(
    sandbox: Sandbox, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", "SECRET")
    host = tmp_path / "host"
    host.write_text("untouched")
    python_at = Path(sandbox_module._python()).parts[1]
    allowed = ["dev", "tmp", "judge.py", "lib", "lib64", "usr", "etc", python_at]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        body = ATTEMPTS[name].replace("HOST", str(host)).replace("REPOSITORY", str(ROOT))
        body = body.replace("PORT", str(server.getsockname()[1])).replace("ALLOWED", repr(allowed))
        program = f"def f():\n    done = []{body}\n    return done\n"
        verdict = judge(sandbox, program, "def check(candidate):\n    done = candidate()\n    assert done == [], done\n")
        assert verdict.reason == "passed"
        with pytest.raises(BlockingIOError):
            server.accept()
    assert host.read_text() == "untouched"
    assert os.listdir(tmp_path) == ["host"]
    assert all_gone()
    assert judge(sandbox, RIGHT).passed


LOOPS = {
    "endless loop": "def f(x):\n    while True: pass",
    "endless loop at the start": "while True: pass",
    "asleep": "import time\ndef f(x):\n    time.sleep(1000)",
    "output flood": "import os\ndef f(x):\n    while True:\n        print('a' * 10**6)\n        os.write(2, b'a' * 10**6)",
    "deaf to signals": "import signal\nfor s in range(1, 30):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except OSError: pass\ndef f(x):\n    while True: pass",
    "its pipes closed": "import os\ndef f(x):\n    os.closerange(3, 64)\n    while True: pass",
    "fork bomb": "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "endless allocation": "def f(x):\n    held = []\n    while True:\n        try: held.append(bytearray(1 << 20))\n        except MemoryError: pass",
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_time_is_limited(name: str, sandbox: Sandbox) -> None:
    verdict = judge(sandbox, LOOPS[name])
    assert not verdict.passed
    assert verdict.timed_out is (name != "its pipes closed")
    assert verdict.seconds < sandbox.time_limit + 2
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
    while not leftovers() and time.monotonic() < deadline:
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
    with pytest.raises(SandboxError, match="does not contain.*files of the machine, the list of processes"):
        Sandbox()
    monkeypatch.setattr(sandbox_module, "bubblewrap", lambda: ["/bin/false"])
    with pytest.raises(SandboxError, match="gave no verdict"):
        Sandbox()
