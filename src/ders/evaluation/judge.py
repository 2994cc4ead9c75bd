"""The judge of one program. It runs inside the sandbox only, as a script, on Python's standard library.

Two processes. The judge holds the tests and a token; the program runs in a child, which is born before the judge reads
either and gets nothing but calls of its function. Only values come back, as JSON of plain types, and are compared
where the program cannot reach. So exiting, printing, patching builtins, searching its memory or returning an object
that equals everything cannot make a wrong program pass.

What a program returns arrives by value: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict,
also nested; an instance of a subclass as the plain type; any other iterable as an iterator. Anything else fails.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 4, 22, 2
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # the second: EPERM
_REASON_LENGTH = 300

# Audit number of the machine, and the system calls refused: a new process or thread (for root a limit on processes
# would not bite), another namespace, memory that the limit of the address space does not count, another process's
# memory, and wide kernel interfaces that no solution needs.
_FILTERS = {
    "x86_64": (
        0xC000003E,
        [
            *(56, 57, 58, 435),  # clone, fork, vfork, clone3
            *(272, 308),  # unshare, setns
            *(29, 319, 447),  # shmget, memfd_create, memfd_secret
            *(101, 310, 311, 438),  # ptrace, process_vm_readv, process_vm_writev, pidfd_getfd
            *(425, 321, 298, 323),  # io_uring_setup, bpf, perf_event_open, userfaultfd
            *(248, 249, 250),  # add_key, request_key, keyctl
        ],
    ),
    # The same in the same order; it has neither fork nor vfork.
    "aarch64": (
        0xC00000B7,
        [220, 435, 97, 268, 194, 279, 447, 117, 270, 271, 438, 425, 280, 241, 282, 217, 218, 219],
    ),
}


class _TimedOut(BaseException):
    """Not an `Exception`, so that no test can swallow it."""


class _FailedError(Exception):
    """The program could not give a value; says why."""


def main() -> None:
    """Read a job from stdin, print one line of JSON: `passed` with the job's token, or `reason`."""
    limits = json.loads(sys.argv[1])
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # the child, of the same user, may not attach to the judge
    for name, value in limits["resources"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.set_int_max_str_digits(0)
    asked, ask = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ask)
        os.close(told)
        _serve(asked, tell)
    os.close(asked)
    os.close(tell)
    verdict_to = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    job = json.loads(sys.stdin.buffer.read())
    for stream in (0, 1, 2):
        os.dup2(silence, stream)  # tests may print
    program = _Program(child, ask, told)
    verdict: dict[str, Any]
    try:
        signal.signal(signal.SIGALRM, _time_out)
        signal.setitimer(signal.ITIMER_REAL, limits["seconds"])
        _judge(job, program)
        verdict = {"passed": True, "token": job["token"]}
    except _TimedOut:
        verdict = {"timed_out": True, "reason": "timed out"}
    except AssertionError as error:
        verdict = {"reason": f"wrong answer: {error}" if str(error) else "wrong answer"}
    except _FailedError as error:
        verdict = {"reason": str(error)}
    except BaseException as error:
        verdict = {"reason": f"{type(error).__name__} in the tests: {error}"}
    signal.setitimer(signal.ITIMER_REAL, 0)
    verdict["reason"] = verdict.get("reason", "passed")[:_REASON_LENGTH]
    os.write(verdict_to, json.dumps(verdict).encode() + b"\n")
    os._exit(0)


def _time_out(*_: Any) -> None:
    raise _TimedOut


def _judge(job: dict[str, Any], program: "_Program") -> None:
    program.ask({"program": job["program"], "entry_point": job["entry_point"]})
    scope: dict[str, Any] = {"__name__": "tests"}
    # The problem's own text: tests use helpers that stand there.
    exec(compile(job["setup"], "<problem>", "exec"), scope)
    exec(compile(job["check"], "<tests>", "exec"), scope)

    def candidate(*args: Any, **kwargs: Any) -> Any:
        return unpack(program.ask({"args": pack(args), "kwargs": pack(kwargs)}))

    scope[job["entry_point"]] = candidate  # a few tests call the function by its name
    scope["check"](candidate)


class _Program:
    """The judge's end of the two pipes."""

    def __init__(self, child: int, ask: int, told: int) -> None:
        self._child = child
        self._ask = os.fdopen(ask, "wb")
        self._told = os.fdopen(told, "rb")

    def ask(self, message: Any) -> Any:
        try:
            self._ask.write(json.dumps(message).encode() + b"\n")
            self._ask.flush()
            line = self._told.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise _FailedError(self._ending())
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise _FailedError(str(answer["error"]))
            return answer["value"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _FailedError("the program wrote into the channel of its answers") from error

    def _ending(self) -> str:
        os.kill(self._child, signal.SIGKILL)  # where it closed its pipes and lives on
        status = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
        return f"the program ended before it answered ({how})"


def _serve(asked: int, tell: int) -> None:
    """The child: close everything of the judge's, then run the program and answer calls until the judge ends."""
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    sys.argv = ["solution"]
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    _refuse_system_calls()
    requests, replies = os.fdopen(asked, "rb"), os.fdopen(tell, "wb")
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    entry_point = ""
    while line := requests.readline():
        try:
            request = json.loads(line)
            if "program" in request:
                entry_point = request["entry_point"]
                exec(compile(request["program"], "<program>", "exec"), module.__dict__)
                value = None
                if not callable(getattr(module, entry_point, None)):
                    raise NameError(f"the program defines no function {entry_point}")
            else:
                args, kwargs = unpack(request["args"]), unpack(request["kwargs"])
                value = pack(getattr(module, entry_point)(*args, **kwargs))
            reply = json.dumps({"value": value})
        except BaseException as error:  # sys.exit among them
            reply = json.dumps({"error": f"{type(error).__name__}: {str(error)[:_REASON_LENGTH]}"})
        replies.write(reply.encode() + b"\n")
        replies.flush()
    os._exit(0)


def _refuse_system_calls() -> None:
    """A seccomp filter (classic BPF) that answers EPERM to the calls named above.

    Raises:
        OSError: the kernel takes no filter.
    """
    audit, calls = _FILTERS[os.uname().machine]
    load, equal, at_least, result = 0x20, 0x15, 0x35, 0x06
    steps = [(load, 0, 0, 4), (equal, 1, 0, audit), (result, 0, 0, _KILL), (load, 0, 0, 0)]
    steps.append((at_least, len(calls) + 1, 0, 0x40000000))  # x86's x32 numbers
    steps += [(equal, len(calls) - number, 0, call) for number, call in enumerate(calls)]
    steps += [(result, 0, 0, _ALLOW), (result, 0, 0, _REFUSE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter")


def pack(value: Any) -> Any:
    """A value as JSON's types; what JSON lacks becomes `{type: contents}`.

    Raises:
        TypeError: it is not made of plain types.
    """
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    if isinstance(value, list):
        return [pack(item) for item in value]
    for collection in (tuple, set, frozenset):
        if isinstance(value, collection):
            return {collection.__name__: [pack(item) for item in value]}
    if hasattr(value, "__iter__"):
        return {"iterator": [pack(item) for item in value]}
    raise TypeError(f"a value of type {type(value).__name__} is no plain data")


_BUILDERS: dict[str, Callable[[Any], Any]] = {
    "complex": lambda parts: complex(*parts),
    "bytes": bytes.fromhex,
    "dict": lambda pairs: {unpack(key): unpack(item) for key, item in pairs},
    "tuple": lambda items: tuple(map(unpack, items)),
    "set": lambda items: set(map(unpack, items)),
    "frozenset": lambda items: frozenset(map(unpack, items)),
    "iterator": lambda items: iter([unpack(item) for item in items]),
}


def unpack(value: Any) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, dict):
        ((name, contents),) = value.items()
        return _BUILDERS[name](contents)
    return value


if __name__ == "__main__":
    main()
