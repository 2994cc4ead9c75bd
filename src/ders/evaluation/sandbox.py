"""Where code that a model wrote is run, and the only place: bubblewrap.

What holds for a program, each tested with one that tries:

- no network; its own process, user, mount, IPC and host namespaces; all capabilities dropped; an environment of three
  harmless variables;
- of the file system it sees Python, the system's libraries and a few devices, all read-only, and an empty `/tmp` of
  64 MiB in memory that goes with it; no `/proc`, no `/etc`, no home, nothing of this repository but the judge's source;
- one process with one thread: the kernel refuses it another (a seccomp filter, for root a limit would not bite), other
  namespaces, and shared memory that no limit counts. 1 GiB of address space, 64 open files, files of 16 MiB, no core;
- CPU and wall-clock time; the judge's time limit starts when the program does, and a second one, some seconds longer,
  kills everything from outside. What it prints goes nowhere; of the judge 64 KiB are read;
- with bubblewrap's first process all others die, and it dies with the process that started it.

Whether it passed is decided in another process of the sandbox, which alone holds the tests (`judge.py`), and told with
a token that is new for each program.

Not defended against: holes in the Linux kernel, in bubblewrap or in Python's JSON reader; side channels; what files
below the system's library folders say to who reads them; use of the machine's CPU and, up to the limits, of its memory.
A program that recognises a problem by its arguments and returns remembered answers passes: it is a right program.
"""

import json
import math
import os
import platform
import secrets
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_JUDGE = Path(__file__).with_name("judge.py")
_MACHINES = ("x86_64", "aarch64")
_MEMORY_BYTES, _TMP_BYTES, _FILE_BYTES, _OPEN_FILES, _OUTPUT_BYTES = 1 << 30, 64 << 20, 16 << 20, 64, 1 << 16
# For the start of bubblewrap and of Python on a busy machine; the judge's own limit begins after it.
_GRACE_SECONDS = 5.0
_INSTALL = "apt-get install bubblewrap (0.8 or later)"

# What must fail inside, before anything generated is run.
_PROBE = """
import os, socket

def contained():
    held = ["environment"] if set(os.environ) - {"LC_CTYPE", "PWD", "PYTHONHASHSEED"} else []
    attempts = {
        "a new process": os.fork,
        "the network": lambda: socket.create_connection(("127.0.0.1", 9), 1),
        "writing to the file system": lambda: open("/written", "w"),
        "files of the machine": lambda: open("/etc/passwd"),
        "the list of processes": lambda: os.listdir("/proc"),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            held.append(name)
        except OSError:
            pass
    return held
"""
_PROBE_CHECK = """
def check(candidate):
    open_ = candidate()
    assert open_ == [], f"open: {', '.join(open_)}"
"""


class SandboxError(OSError):
    """Generated code cannot be contained on this machine."""


@dataclass(frozen=True)
class Verdict:
    """How one program did: passed, or the reason why not (at most 300 characters, of which the program may have
    chosen the words), and the wall-clock seconds from start to end."""

    passed: bool
    reason: str
    timed_out: bool
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """A sandbox that has been tried: making one runs a probe in it.

    Attributes:
        time_limit: wall-clock seconds for a program and its tests, without the start of Python; CPU seconds are limited
            to a little more.

    Raises:
        SandboxError: no bubblewrap, no permission to use it, another system than Linux, or the probe was not held.
        ValueError: the time limit is not a positive number.
    """

    time_limit: float = 3.0

    def __post_init__(self) -> None:
        if isinstance(self.time_limit, bool) or not isinstance(self.time_limit, int | float):
            raise ValueError(f"time_limit must be a number of seconds: got {self.time_limit!r}")
        if not 0 < self.time_limit < math.inf:
            raise ValueError(f"time_limit must be positive: got {self.time_limit}")
        if sys.platform != "linux" or platform.machine() not in _MACHINES:
            raise SandboxError(f"generated code runs on Linux on {' or '.join(_MACHINES)} only, in a sandbox")
        if shutil.which("bwrap") is None:
            raise SandboxError(f"generated code runs in bubblewrap only, which is not installed: {_INSTALL}")
        verdict = self.judge(_PROBE, "contained", "", _PROBE_CHECK)
        if not verdict.passed:
            raise SandboxError(f"bubblewrap does not contain a program here, so none is run: {verdict.reason}")

    def judge(self, program: str, entry_point: str, setup: str, check: str) -> Verdict:
        """Run a program against tests that it does not see.

        Args:
            program: the generated code; it is to define `entry_point`.
            setup: trusted code that the tests need, the problem's own text.
            check: trusted code that defines `check(candidate)`, which raises on a wrong answer.
        """
        token = secrets.token_hex()
        job = {"token": token, "program": program, "entry_point": entry_point, "setup": setup, "check": check}
        started = time.perf_counter()
        with tempfile.TemporaryFile() as stdin:
            stdin.write(json.dumps(job).encode())
            stdin.seek(0)
            output, complaint = _run(self._command(), stdin, self.time_limit + _GRACE_SECONDS)
        seconds = time.perf_counter() - started
        if output is None:
            return Verdict(False, "timed out", True, seconds)
        try:
            told = json.loads(output)
            passed = secrets.compare_digest(str(told.get("token")), token)
            return Verdict(passed, told["reason"], bool(told.get("timed_out")), seconds)
        except (ValueError, KeyError, AttributeError):
            return Verdict(False, f"the judge gave no verdict {complaint}".strip(), False, seconds)

    def _command(self) -> list[str]:
        cpu_seconds = math.ceil(self.time_limit) + 1
        limits = {
            "seconds": self.time_limit,
            "resources": {
                "RLIMIT_AS": _MEMORY_BYTES,
                "RLIMIT_CPU": cpu_seconds,
                "RLIMIT_FSIZE": _FILE_BYTES,
                "RLIMIT_NOFILE": _OPEN_FILES,
                "RLIMIT_CORE": 0,
            },
        }
        # -P -s -S: nothing but the standard library is found, and no folder for user packages is looked for.
        return [*bubblewrap(), _python(), "-P", "-s", "-S", "/judge.py", json.dumps(limits)]


def bubblewrap() -> list[str]:
    """The command up to the program's own."""
    folders = {"/usr/lib", "/usr/lib64", "/lib", "/lib64", str(Path(_python()).parents[1] / "lib")}
    # Of the interpreter, not of a virtual environment: that would be a folder of the user's.
    base = dict.fromkeys(("base", "installed_base", "platbase", "installed_platbase"), sys.base_prefix)
    folders |= {os.path.realpath(sysconfig.get_path(name, vars=base)) for name in ("stdlib", "platstdlib")}
    command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
    command += ["--disable-userns", "--cap-drop", "ALL", "--die-with-parent", "--new-session", "--hostname", "sandbox"]
    for path in (*sorted(folders), "/etc/ld.so.cache", _python()):
        command += ["--ro-bind-try", path, path]
    command += ["--ro-bind", str(_JUDGE), "/judge.py", "--dev", "/dev", "--remount-ro", "/dev"]
    return [*command, "--size", str(_TMP_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _python() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(sys.executable)


def _run(command: list[str], stdin: IO[bytes], seconds: float) -> tuple[bytes | None, str]:
    """(what it printed, the end of its complaints) of a command that is killed, with all it started, when its time is
    over or it prints too much; None for the former."""
    # A fixed seed, so that the order of a set, and a score with it, does not vary.
    environment = {"PYTHONHASHSEED": "0"}
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, env=environment, close_fds=True
        ) as process,
    ):
        try:
            output = _read(process.stdout, time.monotonic() + seconds)
        finally:
            process.kill()
        process.wait()
        stderr.seek(0)
        lines = stderr.read(_OUTPUT_BYTES).decode(errors="replace").splitlines()
    return output, f"({lines[-1]})" if lines else ""


def _read(stream: IO[bytes] | None, deadline: float) -> bytes | None:
    """All that comes until the end of the stream, or its first `_OUTPUT_BYTES`; None when the deadline comes first."""
    assert stream is not None
    poll, received = select.poll(), b""
    poll.register(stream, select.POLLIN | select.POLLHUP)
    while len(received) < _OUTPUT_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            return None
        piece = os.read(stream.fileno(), _OUTPUT_BYTES)
        if not piece:
            return received
        received += piece
    return received
