"""Stopping: on a signal, and when another process of the job is gone."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import subprocess_script

from ders.kernels import global_sum
from ders.training.callbacks import has_stepped
from ders.training.checkpoints import Checkpoints

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_FIRST = "DERS_FIRST_PROCESS"
# Seconds a process has to say what happened, once another of its job is gone.
GRACE = 20.0


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A signal ended training; what `signum` says."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class DeadProcessError(OSError):
    """Another process of the job is gone."""


# How gloo and NCCL say it.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "NCCL error")


@contextlib.contextmanager
def missing_processes_named() -> Iterator[None]:
    """Says in plain words that another process is gone, where torch tells of sockets.

    Raises:
        DeadProcessError: it is.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _GONE):
            raise
        raise DeadProcessError(
            "another process of this job is gone, killed perhaps, or out of memory: its own message may stand above. "
            "Continue with ckpt_path=last"
        ) from error


class StopOnSignal(Callback):
    """SIGTERM, SIGINT or SIGUSR1 to any process saves after the step in progress and ends all of them.

    These are what schedulers send before they kill, and Ctrl-C; a second one ends the process at once.

    Args:
        checkpoints: what saves; None where nothing is kept.

    Raises:
        Interrupted: on all processes, once the checkpoint is written.
    """

    def __init__(self, checkpoints: Checkpoints | None) -> None:
        self.checkpoints, self.received = checkpoints, 0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        # Lightning has put its own in place by now: they would end the job, or broadcast from within a handler. When
        # its trainer ends, in whatever way, it puts back what was there before both.
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING:
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if not has_stepped(trainer) or trainer.global_step == trainer.max_steps:
            return
        signals = torch.zeros(signal.NSIG, dtype=torch.int, device=module.device)
        signals[self.received] = 1
        heard = global_sum(signals)[1:].nonzero().flatten().tolist()
        if not heard:
            return
        signum = heard[0] + 1
        if self.checkpoints is not None and self.checkpoints.saved != trainer.global_step:
            self.checkpoints.save(trainer, module)
        raise Interrupted(
            signum,
            f"{signal.Signals(signum).name} stopped training after step {trainer.global_step} of {trainer.max_steps}; "
            "continue with ckpt_path=last",
        )


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises in here, as Ctrl-C does, so that what runs can clean up and write its record."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum, f"{signal.Signals(signum).name} came before training began, or after it ended")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def watch_children(children: list[subprocess.Popen[bytes]]) -> None:
    """End this process when one of its children fails, after it had the time to fail by itself.

    A collective operation over TCP fails at once when its peer dies; one over NCCL may wait for ever.
    """

    def watch() -> None:
        while True:
            codes = [child.poll() for child in children]
            failed = [(rank, code) for rank, code in enumerate(codes, 1) if code]
            if failed:
                break
            if all(code == 0 for code in codes):
                return
            time.sleep(0.5)
        time.sleep(GRACE)
        rank, code = failed[0]
        print(
            f"error: process {rank} of this job ended with code {code}, and the others still wait for it: all are "
            "stopped. Its own message stands above; continue with ckpt_path=last",
            file=sys.stderr,
            flush=True,
        )
        for child in children:
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-children").start()


# Lightning's observer kills this process within seconds, in the middle of the record it may be writing.
subprocess_script._launch_process_observer = watch_children


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Further processes that are started in here know whose end is theirs."""
    os.environ[_FIRST] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(_FIRST, None)


def die_with_parent() -> None:
    """End this process soon after the one that started it: nobody else would, were that one killed."""
    # Named by it, for it may be gone before this one has come so far.
    parent = int(os.environ.get(_FIRST, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(1.0)
        print("error: the first process of this job is gone: this one ends too", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()


def started_by_lightning() -> bool:
    """Whether this is one of the further processes that a job's first one started."""
    return int(os.environ.get("LOCAL_RANK", 0)) > 0 and "TORCHELASTIC_RUN_ID" not in os.environ and not _under_slurm()


def _under_slurm() -> bool:
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1


def is_first_process() -> bool:
    """Whether this is the one process of a job that writes; known before any of them talk to each other."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return os.environ["RANK"] == "0"
    if _under_slurm():
        return os.environ["SLURM_PROCID"] == "0"
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0
