"""Stages on the true configuration, shrunk."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, SMALL_DATA, language_module

from ders.data.conversation import IGNORED
from ders.reporting.figures import read_metrics
from ders.training.checkpoints import steps_in
from ders.training.modules import NonFiniteLossError
from ders.upcycling import set_trainable


def losses(folder: Path) -> dict[int, str]:
    with (folder / "metrics.csv").open(newline="") as rows:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(rows) if row["train/loss"]}


LONG = ["stage.moe.max_steps=14", "stage.moe.save_every=3", "stage.moe.validate_every=null"]


@pytest.mark.parametrize("method", ["ders_sm", "vanilla"])
def test_a_killed_run_continues_as_if_it_had_never_stopped(
    method: str, run_job: Callable[..., Path], train: Any, outputs: Path, tmp_path: Path
) -> None:
    noise = [f"method={method}", "upcycling.router.second_choice_noise=true"]
    folder = run_job(*LONG, *noise)
    expected, weights = losses(folder), (folder / "model" / "model.safetensors").read_bytes()
    assert sorted(expected) == list(range(14))
    folder.rename(tmp_path / "uninterrupted")

    arguments = [*SMALL, *SMALL_DATA, *LONG, *noise, f"output_dir={outputs}"]
    child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], stderr=subprocess.PIPE, cwd=outputs)
    checkpoints = folder / "checkpoints"
    deadline = time.monotonic() + 120
    while not steps_in(checkpoints):
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    record = json.loads((folder / "record.json").read_text())
    assert (record["status"], "killed" in record["error"]) == ("interrupted", True)
    assert 0 < max(steps_in(checkpoints)) < 14

    assert run_job(*LONG, *noise, "ckpt_path=last") == folder
    assert losses(folder) == expected
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    assert json.loads((folder / "record.json").read_text())["status"] == "finished"


def test_a_limited_run_continues_too(run_job: Callable[..., Path]) -> None:
    whole = losses(run_job("seed=5"))
    folder = run_job("seed=5", "trainer.max_steps=3")  # not a multiple of save_every
    record = json.loads((folder / "record.json").read_text())
    assert (record["status"], sorted(losses(folder))) == ("interrupted", [0, 1, 2])
    assert record["error"] == "stopped at step 3 of 4; continue with ckpt_path=last"
    # Even if the process had died right after saving, before Lightning wrote that step's row.
    rows = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    step = rows[0].strip().split(",").index("step")
    (folder / "metrics.csv").write_text("".join(row for row in rows if row.split(",")[step] != "2"))
    assert sorted(losses(folder)) == [0, 1]
    assert losses(run_job("seed=5", "ckpt_path=last")) == whole


def test_a_non_finite_loss_stops_the_run(run_job: Callable[..., Path], outputs: Path) -> None:
    diverging = ["stage.moe.optimizer.lr=1e30", "stage.moe.gradient_clip=null", "stage.moe.save_every=3", "seed=6"]
    with pytest.raises(NonFiniteLossError, match=r"the loss became (nan|inf) at step \d"):
        run_job(*diverging, "stage.moe.schedule.warmup_fraction=0")
    file = max(outputs.glob("ders_sm-*/record.json"), key=os.path.getmtime)
    record = json.loads(file.read_text())
    assert record["status"] == "failed"
    assert "NonFiniteLossError: the loss became" in record["error"]


def test_ruined_weights_never_replace_a_good_checkpoint(llava_model: Any) -> None:
    module = language_module(llava_model)
    module._trainer = SimpleNamespace(global_step=3, checkpoint_callback=None)
    module.refuse_ruined_weights()
    llava_model.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(
        NonFiniteLossError, match=r"1 weights are not finite, among them model\.lm_head\.weight: not saved"
    ):
        module.refuse_ruined_weights()


def test_accumulation_and_bf16(run_job: Callable[..., Path]) -> None:
    folder = run_job("stage.moe.accumulate=2", "trainer.precision=bf16-mixed", "seed=7")
    metrics = read_metrics(folder / "metrics.csv")
    assert [step for step, _ in metrics["train/loss"]] == [0, 1, 2, 3]
    assert [step for step, _ in metrics["routing/layer_0/entropy"]] == [3]


def test_gradients_of_text_only_batches_reach_every_parameter(llava_model: Any) -> None:
    set_trainable(llava_model.model, "paper")
    module = language_module(llava_model)
    module._trainer = SimpleNamespace(strategy=None)
    idle = module._untouched()
    idle.backward()
    projector = [p for n, p in llava_model.model.named_parameters() if "multi_modal_projector" in n]
    assert all(p.grad is not None for p in projector)
    assert idle == 0


def test_the_loss_needs_only_the_answers_logits(llava_model: Any) -> None:
    set_trainable(llava_model.model, "all")
    model = llava_model.model.double()
    module = language_module(llava_model)
    module._trainer = SimpleNamespace(world_size=1, strategy=None)
    ids = torch.randint(0, llava_model.model.config.image_token_id, (3, 11))
    labels = ids.clone()
    labels[:, :4] = labels[1, :7] = labels[2, 6:] = IGNORED
    module.answer_loss({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    pairs = [(b, t) for b in range(3) for t in range(10) if labels[b, t + 1] != IGNORED]
    twin = sum(-logits[b, t].log_softmax(-1)[labels[b, t + 1]] for b, t in pairs) / len(pairs)
    twin.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)  # the loss itself is fp32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_short_rows_in_bf16_have_the_same_loss(llava_model: Any, checkpointing: bool) -> None:
    module = language_module(llava_model)
    module._trainer = SimpleNamespace(world_size=1, strategy=None)
    module.gradient_checkpointing = checkpointing
    assert isinstance(module._attention(100), contextlib.nullcontext)
    ids = torch.randint(0, llava_model.model.config.image_token_id, (3, 11))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    exact = module.answer_loss(dict(batch))
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(module._attention(100), contextlib.nullcontext) == checkpointing
        assert isinstance(module._attention(300), contextlib.nullcontext)
        torch.testing.assert_close(module.answer_loss(dict(batch)), exact, rtol=0.02, atol=0)
