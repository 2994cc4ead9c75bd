"""A sweep while it runs and when it ended: a line a job, a table in its folder, an exit code that tells."""

import contextlib
import logging
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ders.cli.apart import ERROR_FILE
from ders.cli.app import ROOT, UserError, prepare_hydra, to_plain
from ders.cli.dials import explain_unknown_key
from ders.reporting import read_record
from ders.reporting.identity import run_folder
from ders.reporting.sweeps import SweepFolder, SweepJob, dials_of, line, one_line, rows, summary
from ders.training.processes import is_first_process

log = logging.getLogger(__name__)


class Sweep:
    """The sweep that this process started: says what ended, wherever it ran, and shows the table at the end."""

    current: "Sweep | None" = None

    def __init__(self, folder: SweepFolder) -> None:
        self.folder = folder
        self._said: set[int] = set()
        self._lock, self._over = threading.Lock(), threading.Event()
        # A worker's stderr may be a file on another machine.
        self._watch = threading.Thread(target=self._follow, name="sweep", daemon=True)
        self._watch.start()

    def plan(self, jobs: Sequence[Sequence[str]], refused: Sequence[tuple[Sequence[str], Exception]]) -> None:
        """All jobs, in the order in which they are launched, then those that cannot be."""
        planned = [SweepJob(number, tuple(job)) for number, job in enumerate(jobs)]
        planned += [
            SweepJob(len(jobs) + place, tuple(job)).ends(
                "failed", explain_unknown_key(error, ROOT / "conf", list(job)) or str(error)
            )
            for place, (job, error) in enumerate(refused)
        ]
        self.folder.plan(planned)
        self.say()

    def say(self) -> None:
        """A line for each job that ended since the last look."""
        with self._lock:
            jobs = self.folder.jobs()
            for job in jobs:
                if job.ended and job.number not in self._said:
                    self._said.add(job.number)
                    said = line(job, dials_of(jobs)[job.number], len(self._said), self.folder.total)
                    print(said, file=sys.stderr, flush=True)

    def end(self) -> str | None:
        """Show the table; returns what to exit with where a job failed."""
        self._over.set()
        self._watch.join()
        jobs = self.folder.jobs()
        if not jobs:
            return None
        self.say()
        self.folder.render()
        console = Console(stderr=True)
        console.width = max(console.width, 120)
        console.print(_table(jobs))
        console.print(f"{summary(jobs, self.folder.total)} {self.folder.folder / 'table.md'}", soft_wrap=True)
        failed = [job for job in jobs if job.status == "failed"]
        if not failed:
            return None
        dials = dials_of(jobs)
        told = [f"  #{job.number} {dials[job.number]}: {one_line(job.error)}" for job in failed]
        return "\n".join(
            [
                f"error: {len(failed)} of {len(jobs)} jobs failed. The same command with skip_completed=true runs only "
                "what has no finished record",
                *told,
            ]
        )

    def _follow(self) -> None:
        while not self._over.wait(0.5):
            with contextlib.suppress(OSError):
                self.say()


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Around a command: where it was a sweep, ends with its table, and with exit code 1 where a job failed."""
    stopped = failed = None
    try:
        yield
    except SystemExit as error:
        stopped = error
        if ERROR_FILE in os.environ and isinstance(error.code, str) and is_first_process():
            message = error.code.removeprefix("error: ").split("\n(DERS_TRACEBACK")[0]
            Path(os.environ[ERROR_FILE]).write_text(message)
    finally:
        sweep, Sweep.current = Sweep.current, None
        if sweep is not None:
            failed = sweep.end()
    if failed:
        if stopped is not None:
            print(stopped.code, file=sys.stderr)
        sys.exit(failed)
    if stopped is not None:
        raise stopped


class SweepTable(Callback):
    """Keeps the state of every job of a sweep in the sweep's own folder, from whichever process the job runs in."""

    def __init__(self) -> None:
        self.folder: SweepFolder | None = None  # of a sweep; a single run has none

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        folder = _new_folder(ROOT / config.hydra.sweep.dir)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweep.dir = str(folder)
            # Jobs are composed anew, from the overrides.
            quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
            if config.hydra.runtime.choices["hydra/sweeper"] == "basic":
                # Hydra's own stops at the first job that cannot be composed, and does not say how many there are.
                config.hydra.sweeper = {"_target_": "hydra_plugins.ders_runs_sweeper.RunsSweeper"}
        self.folder = SweepFolder(folder)
        self.folder.begin(shlex.join(["python", "train.py", *sys.argv[1:]]), config.hydra.sweeper.get("n_trials"))
        Sweep.current = Sweep(self.folder)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if self.folder is None:
            return
        prepare_hydra()  # a launcher's worker is new to everything
        number = config.hydra.job.num
        job = self.folder.job(number) or SweepJob(number, tuple(config.hydra.overrides.task))
        run = _run_of(config)
        self.folder.put(job.starts(run and run.name, _stamp(run)))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if self.folder is None:
            return
        job = self.folder.job(config.hydra.job.num)
        assert job is not None
        self.folder.put(_ended(job, _run_of(config), job_return))
        if Sweep.current is not None:
            Sweep.current.say()


def _ended(job: SweepJob, run: Path | None, job_return: JobReturn) -> SweepJob:
    value = job_return._return_value  # the property would raise
    if job_return.status != JobStatus.COMPLETED:
        if not isinstance(value, UserError | ValueError | ArithmeticError | OSError) or os.environ.get(
            "DERS_TRACEBACK"
        ):
            traceback.print_exception(value)  # on its way to the sweep it would be lost
        job_return.return_value = _portable(value)
        return job.ends("failed", str(value) or type(value).__name__)
    if run is None or not (run / "record.json").exists():
        return job.ends("finished")
    record = read_record(run / "record.json")
    skipped = _stamp(run) == job.stamp
    accuracy = record["metrics"].get("test/accuracy", {}).get("value")
    return job.ends("skipped" if skipped else record["status"], record["error"], accuracy=accuracy, score=value)


def _portable(error: Exception) -> Exception:
    """The error itself, or one that says the same and can be sent to another process."""
    sent_as_it_is = isinstance(error, UserError) or type(error).__module__ == "builtins"
    return error if sent_as_it_is else UserError(f"{type(error).__name__}: {error}")


def _run_of(config: DictConfig) -> Path | None:
    try:
        job = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        return run_folder(to_plain(job), ROOT)
    except Exception:  # what is wrong with this configuration the job itself will say
        return None


def _stamp(run: Path | None) -> int | None:
    with contextlib.suppress(OSError):
        return None if run is None else (run / "record.json").stat().st_mtime_ns
    return None


def _new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    for name in (now, *(f"{now}_{n}" for n in range(1, 1000))):
        with contextlib.suppress(FileExistsError):
            (parent / name).mkdir()
            return parent / name
    raise OSError(f"{parent}: a thousand sweeps in one second")


def _table(jobs: list[SweepJob]) -> Table:
    header, *body = rows(jobs)
    table = Table(box=SIMPLE_HEAD)
    for name in header:
        table.add_column(
            name, justify="right" if name in ("#", "accuracy", "validation", "time") else "left", overflow="fold"
        )
    for job, row in zip(jobs, body, strict=True):
        table.add_row(*row, style="red" if job.status == "failed" else None)
    return table
