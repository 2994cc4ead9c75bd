"""Jobs of a sweep in processes of their own.

Lightning starts the other processes of a run by the command that started this one, and kills this one when one of them
dies. In a sweep, that command is the sweep's, or a launcher's worker's, and who would be killed is the sweep. So such a
job is started as what it is, `train.py` with its own overrides: whatever happens to it, the sweep goes on.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ders.cli.app import ROOT, UserError
from ders.reporting import finish_record, read_record, start_record, write_record

# Where a job's own process writes why it ended.
ERROR_FILE = "DERS_ERROR_FILE"
# By these Lightning would take the processes of a run for started by Slurm, one a task; a worker is one task.
_ONE_TASK = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def starts_apart(config: DictConfig) -> bool:
    """Whether this job of a sweep needs its own process: it has several, or shares its worker with other jobs."""
    if not HydraConfig.initialized() or "num" not in HydraConfig.get().job:
        return False
    return not _in_the_sweeps_process() or config.trainer.devices != 1 or config.trainer.num_nodes != 1


def run_apart(plain: dict[str, Any], folder: Path, command: list[str]) -> None:
    """Run this job as a command of its own, which prints the path of its record.

    SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 (a cluster's notice) reach it as SIGINT and SIGTERM; a second one kills it.

    Raises:
        UserError: it failed; where it was killed, its record is written here.
        KeyboardInterrupt, SystemExit: the sweep itself is to stop.
    """
    job = [sys.executable, str(ROOT / "train.py"), *HydraConfig.get().overrides.task, "hydra.mode=RUN"]
    record = start_record(ROOT, plain, command)
    with tempfile.TemporaryDirectory() as temporary:
        error = Path(temporary) / "error.txt"
        process = subprocess.Popen(job, env=_environment(error), start_new_session=True)
        try:
            with _stops_passed_on(process) as stops:
                code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):  # what its main process left behind
                os.killpg(process.pid, signal.SIGKILL)
        message = error.read_text() if error.exists() else None
    file = folder / "record.json"
    if code < 0 and not (file.exists() and read_record(file)["status"] == "finished"):  # it could not say so itself
        write_record(finish_record(record, "interrupted" if stops else "failed", _ending(code)), file)
    if stops and _in_the_sweeps_process():
        raise KeyboardInterrupt if stops[0] == signal.SIGINT else SystemExit(128 + stops[0])
    if code:
        raise UserError(message or _ending(code))


def _ending(code: int) -> str:
    if code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def _in_the_sweeps_process() -> bool:
    return HydraConfig.get().runtime.choices["hydra/launcher"] == "basic"


def _environment(error: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in _ONE_TASK}
    return {**kept, ERROR_FILE: str(error)}


@contextlib.contextmanager
def _stops_passed_on(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Collects the signals that came, each passed on. In place of a worker's own, which would start the job again."""
    stops: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stops
        return

    def stop(number: int, _: Any) -> None:
        if stops:
            process.kill()
        else:
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        stops.append(number)

    before = {number: signal.signal(number, stop) for number in _STOPS}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
