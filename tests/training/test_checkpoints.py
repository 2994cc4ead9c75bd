"""Checkpoints on the disk: which are whole, which are kept, which can be continued."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ders.models.bundle import load_bundle
from ders.training.checkpoints import CheckpointError, Saved, best_of, find, publish, steps_in
from ders.training.strategies import refuse_other_state


def written(folder: Path, step: int, **changes: Any) -> Path:
    checkpoint = folder / f"step_{step:06d}"
    (checkpoint / "model").mkdir(parents=True)
    (checkpoint / "model" / "config.json").write_text("{}")
    (checkpoint / "state").write_text("state")
    described = {"step": step, "state": "whole", "world_size": 1, "accumulate": 1, "identity": {}, "last_row": {}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(described | changes))
    return checkpoint


def test_only_whole_ones_are_found(tmp_path: Path) -> None:
    written(tmp_path, 2)
    written(tmp_path, 10)
    (written(tmp_path, 12) / "checkpoint.json").unlink()
    written(tmp_path, 14).rename(tmp_path / ".step_000014.unfinished")
    assert list(steps_in(tmp_path)) == [2, 10]
    assert find("last", tmp_path) == Saved.read(tmp_path / "step_000010")
    assert find("auto", tmp_path / "nothing") is None
    with pytest.raises(CheckpointError, match="ckpt_path=best: no such checkpoint"):
        find("best", tmp_path)
    (tmp_path / "best.json").write_text(json.dumps({"step": 2, "metric": "val/loss", "value": 1.0}))
    found = find("best", tmp_path)
    assert found is not None
    assert found.step == 2
    (tmp_path / "step_000010" / "state").unlink()
    with pytest.raises(CheckpointError, match="has lost its state"):
        find("last", tmp_path)


def test_a_run_keeps_the_last_and_the_best(run_job: Callable[..., Path]) -> None:
    folder = run_job("stage.moe.max_steps=6", "stage.moe.save_every=1", "keep_checkpoints=1", "seed=40")
    best = best_of(folder / "checkpoints")
    assert best is not None
    assert best["metric"] == "val/accuracy"
    assert set(steps_in(folder / "checkpoints")) == {best["step"], 6}
    assert not [entry for entry in (folder / "checkpoints").iterdir() if entry.name.startswith(".")]
    state = torch.load(folder / "checkpoints" / "step_000006" / "state", weights_only=True)
    # What is frozen is the parent's, and stands in the model folder once.
    model = load_bundle(folder / "checkpoints" / "step_000006" / "model").model
    assert state["state_dict"]
    assert len(state["state_dict"]) < len(dict(model.named_parameters()))
    assert not any("vision_tower" in name for name in state["state_dict"])
    exported, last = (load_file(path / "model.safetensors") for path in (folder / "model", model_of(folder, 6)))
    assert all(torch.equal(exported[name], last[name]) for name in last)

    chosen = run_job("stage.moe.max_steps=6", "stage.moe.save_every=1", "export=best", "seed=40")
    assert chosen != folder  # what is scored is another model
    step = best_of(chosen / "checkpoints")["step"]  # type: ignore[index]
    exported, best_model = (
        load_file(path / "model.safetensors") for path in (chosen / "model", model_of(chosen, step))
    )
    assert all(torch.equal(exported[name], best_model[name]) for name in best_model)


def model_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:06d}" / "model"


def test_publishing_replaces_what_was_there(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, 1)
    (tmp_path / "model").mkdir()
    for name in ("config.json", "old"):
        (tmp_path / "model" / name).write_text("")
    publish(checkpoint, tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("saved", "here", "goes_on"),
    [
        (("whole", 1), ("whole", 2), True),
        (("fsdp2", 2), ("fsdp2", 4), True),
        (("zero2", 2), ("zero2", 2), True),
        (("zero2", 2), ("zero2", 4), False),
        (("zero2", 2), ("zero3", 2), False),
        (("whole", 2), ("zero1", 2), False),
    ],
)
def test_which_processes_can_go_on(saved: tuple[str, int], here: tuple[str, int], goes_on: bool) -> None:
    of = {"state": saved[0], "world_size": saved[1]}
    if goes_on:
        refuse_other_state(of, *here)
        return
    with pytest.raises(ValueError, match="divided otherwise"):
        refuse_other_state(of, *here)
