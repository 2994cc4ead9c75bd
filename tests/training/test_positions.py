"""Methods that choose or move positions, in the true run."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, SMALL_DATA
from safetensors.torch import load_file

import ders
from ders.cli.app import UserError
from ders.deltas import LowRankByLoadDelta, RegrownSparseDelta, SparseDelta
from ders.models.bundle import load_bundle
from ders.training.positions import FisherPositions, RegrowPositions, rearrange_state_
from ders.upcycling.positions import regrown_deltas

METHODS = {
    "fisher": ["method=ders_sm_fisher", "sparsity=0.999", "calibration_rows=3"],
    "gradient": ["method=ders_sm_rigl", "sparsity=0.999", "update_every=1"],
    "load": ["method=ders_lm_by_load", "calibration_rows=3", "rank=3"],
    "random": ["method=ders_sm_rigl", "sparsity=0.999", "update_every=1", "grow=random", "stage.moe.accumulate=2"],
}


def decisions(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    return {n: t for n, t in found.items() if n.endswith(("support_EB", "ranks_E"))}


def positions(folder: Path) -> set[tuple[str, int, int]]:
    """(delta, expert, position) of every value, or number of every rank."""
    found = set()
    for name, delta in load_bundle(folder).model.named_modules():
        if isinstance(delta, SparseDelta):
            found |= {(name, e, p) for e in range(delta.num_experts) for p in delta.positions(e).tolist()}
        if isinstance(delta, LowRankByLoadDelta):
            found |= {(name, e, number) for e, rank in enumerate(delta.ranks_E) for number in range(rank)}
    return found


def moved(one: Path, other: Path) -> bool:
    before, after = decisions(one), decisions(other)
    assert before
    return not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", METHODS)
def test_a_continued_run_equals_a_whole_one(method: str, run_job: Callable[..., Path], tmp_path: Path) -> None:
    dials = [*METHODS[method], "seed=20", "stage.moe.max_steps=6", "keep_checkpoints=9"]
    folder = run_job(*dials)
    shutil.move(folder, tmp_path / "whole")
    run_job(*dials, "trainer.max_steps=3")
    assert run_job(*dials, "ckpt_path=last") == folder
    one, other = (f / "model" / "model.safetensors" for f in (tmp_path / "whole", folder))
    assert one.read_bytes() == other.read_bytes()
    early, late, last = (tmp_path / "whole" / "checkpoints" / f"step_00000{step}" / "model" for step in (2, 4, 6))
    assert moved(early, late) == (method in ("gradient", "random"))
    assert not moved(late, last)  # a quarter of the stage is for those that are there


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        (["method=ders_sm_fisher", "calibration_rows=0"], "calibration_rows must be a whole number from 1 on: got 0"),
        (["method=ders_sm_fisher", "sparsity=0.5"], "sparsity must be at least 0.75 for 4 experts"),
        (["method=ders_sm_rigl", "update_every=0"], "update_every must be a whole number from 1 on: got 0"),
        (["method=ders_sm_rigl", "drop_fraction=1.5"], r"drop_fraction must be in \(0, 1\]: got 1.5"),
        (["method=ders_sm_rigl", "grow=magic"], "grow must be one of gradient, random: got 'magic'"),
        (["method=ders_sm_rigl", "trainer=deepspeed_zero2"], "under zero2 they are divided: use trainer=cpu, gpu"),
        (["method=ders_sm_fisher", "trainer=fsdp2"], "under fsdp2 they are divided"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    dials: list[str], message: str, run_job: Callable[..., Path]
) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        run_job(*dials)


def test_the_fraction_falls_and_ends() -> None:
    regrow = RegrowPositions(update_every=10, drop_fraction=0.3)
    fractions = [regrow.fraction_at(step, 120) for step in range(0, 121, 10)]
    assert fractions[0] == 0.3
    assert fractions == sorted(fractions, reverse=True)
    assert regrow.fraction_at(45, 120) == pytest.approx(0.15)
    assert [fraction > 0 for fraction in fractions] == [True] * 9 + [False] * 4


def test_an_optimizers_state_follows() -> None:
    delta = RegrownSparseDelta(2, 5, 4, sparsity=0.8)
    source = torch.tensor([2, -1, 0, 3])
    state: dict[str, Any] = {"step": torch.tensor(7.0), "exp_avg": torch.arange(8.0).view(2, 4) + 1}
    rearrange_state_(state, delta, 1, source)
    assert state["exp_avg"].tolist() == [[1, 2, 3, 4], [7, 0, 5, 8]]
    with pytest.raises(ValueError, match="exp_avg_sq_row is not kept value by value"):
        rearrange_state_({"exp_avg_sq_row": torch.zeros(2)}, delta, 0, source)


def test_an_exchange_begins_anew_at_new_positions(dense_model: Callable[..., Any]) -> None:
    model = dense_model()
    ders.upcycle(model, delta=functools.partial(RegrownSparseDelta, sparsity=0.9))
    deltas = regrown_deltas(model)
    torch.manual_seed(0)
    for delta in deltas:
        torch.nn.init.normal_(delta.values_EN)
    optimizer = torch.optim.AdamW([delta.values_EN for delta in deltas], lr=1e-3)
    sum(delta.values_EN.square().sum() for delta in deltas).backward()
    optimizer.step()
    before = [(delta.positions(1).tolist(), delta.dense(1).flatten()) for delta in deltas]
    progress = SimpleNamespace(current=SimpleNamespace(ready=4))
    trainer: Any = SimpleNamespace(
        global_step=4,
        accumulate_grad_batches=1,
        optimizers=[optimizer],
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    regrow = RegrowPositions(update_every=4, drop_fraction=0.5, grow="random")
    regrow.on_train_batch_end(trainer, SimpleNamespace(model=model, num_steps=100, seed=0), None, None, 3)
    for delta, (held, dense) in zip(deltas, before, strict=True):
        after, state = delta.positions(1), optimizer.state[delta.values_EN]
        new = ~torch.isin(after, torch.tensor(held)) | (delta.values_EN[1] == 0)
        assert int(new.sum()) == round(regrow.fraction_at(4, 100) * delta.num_kept)
        assert torch.equal(delta.values_EN[1][~new], dense[after[~new]])
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name][1] == 0, new)


@pytest.mark.parametrize("bad", [0, -1, 1.5, None])
def test_rows_must_be_some(bad: Any) -> None:
    with pytest.raises(ValueError, match="calibration_rows"):
        FisherPositions(bad)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_find_the_same_positions(method: str, outputs: Path, command: Any) -> None:
    dials = [*SMALL, *SMALL_DATA, f"output_dir={outputs}", *METHODS[method], "seed=21"]
    many = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    folders = []
    for trainer in ([], many):
        result = command(str(ROOT / "train.py"), *dials, *trainer)
        assert result.returncode == 0, result.stderr[-3000:]
        folders.append(Path(result.stdout.splitlines()[-1]).parent / "model")
    one, other = (positions(folder) for folder in folders)
    # Adam's first steps are all of one size: which of two equal values is dropped is for rounding to say.
    assert len(one) == len(other)
    assert len(one - other) <= 0.02 * len(one)
