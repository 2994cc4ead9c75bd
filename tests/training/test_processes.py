"""Signals, stuck workers, spikes: how a run stops, and what it says."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, language_module

from ders.data.loading import Conversations
from ders.evaluation.fault_suite import Campaign
from ders.reporting.figures import read_metrics
from ders.training import processes
from ders.training.checkpoints import steps_in
from ders.training.processes import (
    DeadProcessError,
    is_first_process,
    missing_processes_named,
    started_by_lightning,
)

LONG = ["stage.moe.max_steps=30", "stage.moe.save_every=4", "stage.moe.validate_every=null"]


def send(signum: int, outputs: Path) -> None:
    """To this process, once a run of it has saved."""
    known = set(outputs.glob("*/checkpoints/step_*"))

    def wait() -> None:
        while set(outputs.glob("*/checkpoints/step_*")) <= known:
            time.sleep(0.005)
        os.kill(os.getpid(), signum)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(signum: int, run_job: Callable[..., Path], outputs: Path, tmp_path: Path) -> None:
    dials = [*LONG, f"seed={50 + signum}"]
    handlers = [signal.getsignal(number) for number in processes.STOPPING]
    send(signum, outputs)
    with pytest.raises(SystemExit) as stopped:
        run_job(*dials)
    assert stopped.value.code == 128 + signum
    assert [signal.getsignal(number) for number in processes.STOPPING] == handlers
    record = max(outputs.glob("ders_sm-*/record.json"), key=os.path.getmtime)
    told = json.loads(record.read_text())
    last = max(steps_in(record.parent / "checkpoints"))
    assert told["status"] == "interrupted"
    assert f"{signal.Signals(signum).name} stopped training after step {last} of 30" in told["error"]
    assert last < 30
    folder = run_job(*dials, "ckpt_path=last")
    assert folder == record.parent
    assert [signal.getsignal(number) for number in processes.STOPPING] == handlers  # after a whole training, too
    ended = (folder / "model" / "model.safetensors").read_bytes()
    losses = read_metrics(folder / "metrics.csv")["train/loss"]
    folder.rename(tmp_path / "continued")
    whole = run_job(*dials)
    assert (whole / "model" / "model.safetensors").read_bytes() == ended
    assert read_metrics(whole / "metrics.csv")["train/loss"] == losses


def test_a_stuck_data_worker_ends_the_job(run_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run_job()  # the parent is there
    monkeypatch.setattr(Conversations, "__getitem__", lambda self, index: time.sleep(60))
    with pytest.raises(RuntimeError, match="DataLoader timed out after 1 seconds"):
        run_job("+stage.moe.num_workers=1", "+stage.moe.data_timeout=1", "seed=60")


def guarded(module: Any, losses: list[float]) -> list[float]:
    return [module.guarded(torch.tensor(loss), step).item() for step, loss in enumerate(losses)]


def test_the_gradient_of_a_spike_is_dropped_on_request(llava_model: Any) -> None:
    module = language_module(llava_model)
    module._trainer = SimpleNamespace(world_size=1, global_step=3, checkpoint_callback=None)
    module.log = lambda *_, **__: None
    steady = [1.0 + 0.01 * n for n in range(12)]
    assert guarded(module, [*steady, 50.0]) == pytest.approx([*steady, 50.0])
    module.skip_spikes = 5.0
    assert guarded(module, [*steady, 50.0, 2.0, 6.0]) == pytest.approx([*steady, 0.0, 2.0, 0.0])
    saved: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(saved)
    assert saved["ders_recent_losses"] == pytest.approx([*steady, 2.0])
    other = language_module(llava_model)
    other.on_load_checkpoint(saved)
    assert other.recent_losses == module.recent_losses


def test_what_is_not_finite_names_its_rows(llava_model: Any, tmp_path: Path) -> None:
    module = language_module(llava_model)
    saver = SimpleNamespace(newest=lambda: tmp_path / "step_000004")
    data = SimpleNamespace(rows_of=lambda batch_idx: [7, 11])
    module._trainer = SimpleNamespace(world_size=1, global_step=5, checkpoint_callback=saver, datamodule=data)
    expected = (
        r"became nan at step 5, on rows \[7, 11\] of the training split\. The last good checkpoint is .*step_000004"
    )
    with pytest.raises(ArithmeticError, match=expected):
        module.guarded(torch.tensor(math.nan), 5)


def test_a_missing_process_is_named() -> None:
    with pytest.raises(DeadProcessError, match="another process of this job is gone"), missing_processes_named():
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:23429")
    with pytest.raises(RuntimeError, match="something else"), missing_processes_named():
        raise RuntimeError("something else")


def test_a_process_whose_parent_is_gone_before_it_looked_ends() -> None:
    script = """
import os, time
os.environ["DERS_FIRST_PROCESS"] = "1000000000"  # nobody's, as of one that is gone
from ders.training.processes import die_with_parent
die_with_parent()
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "the first process of this job is gone" in done.stderr


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path: Path) -> None:
    campaign = Campaign(ROOT / "train.py", tmp_path / "work", kills_per_cell=1, budget_seconds=300)
    campaign.cell("dense", "single")  # whose parent the other takes
    row = campaign.cell("dense", "ddp")
    assert (row["kills"], row["hung"], row["unreadable"], row["lost"]) == (1, 0, 0, 0)
    assert row["weights_difference"] <= row["tolerance"]


@pytest.mark.parametrize(
    ("environment", "first", "child"),
    [
        ({}, True, False),
        ({"LOCAL_RANK": "1"}, False, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False, False),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0"}, True, False),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "2", "LOCAL_RANK": "0"}, False, False),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "1"}, False, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, True, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, False, False),
    ],
)
def test_who_writes(environment: dict[str, str], first: bool, child: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "NODE_RANK", "RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is first
    assert started_by_lightning() is child
