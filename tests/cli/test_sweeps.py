"""Sweeps: under each launcher, with failures, killed, searched; no part of them is a stand-in."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, SMALL, SMALL_DATA

from ders.cli.train import main
from ders.reporting.figures import read_metrics
from ders.reporting.sweeps import SweepFolder, SweepJob

TWO_PROCESSES = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def last_sweep(outputs: Path) -> SweepFolder:
    return SweepFolder(max((outputs / ".sweeps").iterdir(), key=lambda folder: folder.stat().st_mtime_ns))


def in_this_process(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """`python train.py …` here, which saves its start; returns what it exits with."""

    def start(*arguments: str) -> str | None:
        flags, dials = ([a for a in arguments if (a == "-m") is flag] for flag in (True, False))
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *SMALL, *SMALL_DATA, f"output_dir={outputs}", *dials])
        try:
            main()
        except SystemExit as stopped:
            return str(stopped.code)
        return None

    return start


def test_a_planted_failure_and_a_second_start(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = in_this_process(outputs, monkeypatch)
    # The first diverges and leaves a record; the second is refused; the third works; dense cannot even be composed.
    sweep = ["-m", "seed=20", "method=ders_sm,dense", "sparsity=0.9", "stage.moe.optimizer.lr=1e30,-1,1e-3"]
    code = start(*sweep)
    assert code is not None
    assert code.startswith("error: 5 of 6 jobs failed. The same command with skip_completed=true")
    assert "\n  #1 method=ders_sm stage.moe.optimizer.lr=-1: stage.moe: optimizer or schedule cannot be built" in code
    assert "\n  #3 method=dense stage.moe.optimizer.lr=1e+30: sparsity is a dial of method=ders_sm" in code
    said = capsys.readouterr()
    jobs = last_sweep(outputs).jobs()
    assert [job.status for job in jobs] == ["failed", "failed", "finished", "failed", "failed", "failed"]
    diverged, _, finished, *_ = (outputs / str(job.run) for job in jobs)
    assert said.out.splitlines() == [str(finished / "record.json")]
    assert f"6/6 finished {finished.name} accuracy " in said.err
    assert "6 of 6 jobs ended: 1 finished, 5 failed." in said.err
    record = json.loads((diverged / "record.json").read_text())
    assert (record["status"], "loss" in record["error"]) == ("failed", True)
    assert jobs[0].error is not None
    assert jobs[0].error in record["error"]

    before = (finished / "record.json").stat().st_mtime_ns
    assert start(*sweep, "skip_completed=true") is not None
    said = capsys.readouterr()
    assert [job.status for job in last_sweep(outputs).jobs()][:3] == ["failed", "failed", "skipped"]
    assert (finished / "record.json").stat().st_mtime_ns == before
    assert (diverged / "previous" / "0" / "record.json").exists()  # it alone ran again
    assert said.out.splitlines() == [str(finished / "record.json")]
    assert f"6/6 skipped {finished.name} accuracy " in said.err


def test_nothing_runs_where_no_job_can_be_composed(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = in_this_process(outputs, monkeypatch)
    assert start("-m", "sparsty=0.5", "seed=0,1") == (
        "error: there is no dial 'sparsty'. The same command with --cfg job prints all there are"
    )
    assert "an interval needs hparams_search=optuna" in str(start("-m", "sparsity=interval(0.1,0.9)"))
    assert last_sweep(outputs).jobs() == []


def test_a_search_goes_by_validation(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = in_this_process(outputs, monkeypatch)
    search = ["hparams_search=optuna", "hydra.sweeper.n_trials=2", "sparsity=choice(0.9,0.99)", "data.num_val=40"]
    assert start("-m", *search, "seed=21") is None
    sweep = last_sweep(outputs)
    jobs = sweep.jobs()
    assert sweep.total == len(jobs) == 2
    for job in jobs:
        assert job.score == read_metrics(outputs / str(job.run) / "metrics.csv")["val/accuracy"][-1][1]
    record = json.loads((outputs / str(jobs[0].run) / "record.json").read_text())
    assert "hparams_search" not in record["command"]
    assert "-m" not in record["command"].split()
    best = yaml.safe_load((sweep.folder / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(job.score for job in jobs if job.score is not None)

    # Again: the same proposals, whose stored scores lead to the same end. It sweeps without -m, too.
    assert start(*search, "seed=21", "skip_completed=true") is None
    again = last_sweep(outputs)
    assert [(job.status, job.run, job.score) for job in again.jobs()] == [("skipped", j.run, j.score) for j in jobs]
    assert yaml.safe_load((again.folder / "optimization_results.yaml").read_text()) == best

    assert "set stage.moe.validate_every" in str(start(*search, "stage.moe.validate_every=null"))
    compression = ["method=vanilla", "compression=quantize", "bits=2"]
    found = start("hparams_search=optuna", "hydra.sweeper.n_trials=1", *compression)
    assert "a compression is scored on the test questions only" in str(found)


def test_joblib_tells_what_it_skips_and_what_fails(train: Any, run_job: Callable[..., Path], outputs: Path) -> None:
    folder = run_job("seed=22", "sparsity=0.9")
    sweep = ["-m", "seed=22", "sparsity=0.9,1.5", "skip_completed=true"]
    result = train(*sweep, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    assert result.returncode == 1
    assert result.stdout.splitlines() == [str(folder / "record.json")]
    assert f"1/2 skipped {folder.name} accuracy " in result.stderr
    assert result.stderr.splitlines()[-1].startswith("  #1 sparsity=1.5: sparsity must be in [0, 1)")
    assert "deprecated" not in result.stderr
    assert [job.status for job in last_sweep(outputs).jobs()] == ["skipped", "failed"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_two_jobs_of_two_processes(launcher: str, train: Any, outputs: Path) -> None:
    result = train("-m", "seed=23", "sparsity=0.9,0.99", *TWO_PROCESSES, f"hydra/launcher={launcher}")
    assert result.returncode == 0, result.stderr
    sweep = last_sweep(outputs)
    jobs = sweep.jobs()
    assert [job.status for job in jobs] == ["finished", "finished"]
    for job, sparsity in zip(jobs, (0.9, 0.99), strict=True):
        record = json.loads((outputs / str(job.run) / "record.json").read_text())
        assert (record["config"]["sparsity"], record["config"]["trainer"]["devices"]) == (sparsity, 2)
        assert len(read_metrics(outputs / str(job.run) / "metrics.csv")["train/loss"]) == 4
    paths = {str(outputs / str(job.run) / "record.json") for job in jobs}
    if launcher == "joblib":
        assert set(result.stdout.splitlines()) == paths
        assert len(result.stdout.splitlines()) == 2  # a child that started the sweep again would print more
    else:
        logs = (sweep.folder / "submitit").glob("*/*_log.out")
        assert {path for log in logs for path in log.read_text().splitlines() if path.endswith("record.json")} == paths
    assert "2/2 finished" in result.stderr


@pytest.mark.slow
def test_what_a_killed_job_and_a_killed_sweep_leave(outputs: Path, tmp_path: Path) -> None:
    dials = [*SMALL, *SMALL_DATA, f"output_dir={outputs}", "seed=24,25,26", "stage.moe.max_steps=2000"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]
    known = set((outputs / ".sweeps").glob("*"))
    said = tmp_path / "stderr"  # no pipe: a job that outlives the sweep would hold it open
    sweep = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "-m", *dials, *launcher],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stderr=said.open("w"),
        start_new_session=True,
    )
    orphan = None
    try:
        (folder,) = until(lambda: set((outputs / ".sweeps").glob("*")) - known)
        os.kill(training(SweepFolder(folder), outputs, 0), signal.SIGKILL)
        orphan = training(SweepFolder(folder), outputs, 1)
        os.killpg(sweep.pid, signal.SIGKILL)
        assert "1/3 FAILED" in said.read_text()
        first, second, third = SweepFolder(folder).jobs()
        assert (first.status, second.status, third.status) == ("failed", "running", "waiting")
        record = json.loads((outputs / str(first.run) / "record.json").read_text())
        assert (record["status"], record["error"]) == ("failed", "its process was killed by SIGKILL")
        assert "1 of 3 jobs ended: 1 failed, 1 running, 1 waiting." in (folder / "table.md").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(sweep.pid, signal.SIGKILL)
        if orphan is not None:
            os.kill(orphan, signal.SIGKILL)
        sweep.wait()


def training(sweep: SweepFolder, outputs: Path, number: int) -> int:
    """The process of a job, as soon as it trains."""
    job: SweepJob = until(lambda: (job := sweep.job(number)) and job.run and job)
    until((outputs / str(job.run) / "config.yaml").exists)
    seed = next(o for o in job.overrides if o.startswith("seed="))
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if seed in words and f"output_dir={outputs}" in words and "hydra.mode=RUN" in words:
                return int(folder.name)
    raise AssertionError(f"no process of {job}")


def until(found: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.1)
    raise AssertionError("it took too long")
