"""The state of a sweep on disk: whole whoever writes, telling whoever is killed."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from ders.reporting.sweeps import SweepFolder, SweepJob, line


def begun(folder: Path, jobs: int, *, start: int = 0) -> SweepFolder:
    sweep = SweepFolder(folder)
    sweep.begin("python train.py -m x=…", None)
    sweep.plan([SweepJob(number, ("y=1", f"x={number}")) for number in range(start, jobs)])
    return sweep


def one(folder: Path, number: int) -> None:
    sweep = SweepFolder(folder)
    job = sweep.job(number)
    assert job is not None
    sweep.put(job.starts(f"ders_sm-{number}", None))
    sweep.put(sweep.job(number).ends("finished", accuracy=0.5))  # type: ignore[union-attr]


def test_the_table_shows_what_waits_runs_and_never_ended(tmp_path: Path) -> None:
    sweep = begun(tmp_path, 4)
    sweep.put(SweepJob(0, ("y=1", "x=0")).starts("ders_sm-a", None).ends("failed", "broken:\n a | b"))
    sweep.put(SweepJob(1, ("y=1", "x=1")).starts("ders_sm-b", None))
    first, _, header, _, *lines = (tmp_path / "table.md").read_text().splitlines()  # as a kill leaves it
    assert "1 of 4 jobs ended: 1 failed, 1 running, 2 waiting." in first
    assert header == "| # | run | dials | status | accuracy | validation | time | error |"
    assert lines[0] == "| 0 | ders_sm-a | x=0 | failed |  |  | 0 s | broken: a \\| b |"
    assert lines[1].startswith("| 1 | ders_sm-b | x=1 | running since ")
    assert lines[3] == "| 3 |  | x=3 | waiting |  |  |  |  |"


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    sweep = begun(tmp_path, 12)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(one, [tmp_path] * 12, range(12)))
    assert [job.status for job in sweep.jobs()] == ["finished"] * 12
    table = (tmp_path / "table.md").read_text()
    assert "12 of 12 jobs ended: 12 finished." in table
    assert table.count("| finished | 50.0 |") == 12
    assert not list(tmp_path.rglob("*.partial"))
    assert json.loads((tmp_path / "jobs" / "7.json").read_text())["run"] == "ders_sm-7"


def test_what_is_said_of_a_job() -> None:
    job = SweepJob(2, ("seed=1",)).starts("ders_sm-6a97a82d59", None)
    assert (
        line(job.ends("finished", accuracy=0.78), "", 3, 12) == "3/12 finished ders_sm-6a97a82d59 accuracy 78.0 % 0 s"
    )
    assert line(job.ends("failed", "no\nspace"), "", 4, None) == "4 FAILED ders_sm-6a97a82d59: no space"
    assert line(SweepJob(1, ("a=1",)).ends("failed", "why"), "a=1", 1, 2) == "1/2 FAILED a=1: why"
    assert line(job.ends("skipped", accuracy=0.5), "", 5, 12) == "5/12 skipped ders_sm-6a97a82d59 accuracy 50.0 %"
