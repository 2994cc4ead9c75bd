"""The paper's recipes: what S19 and the base codes state, and that each runs on its tiny twin."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ders.cli.app import UserError, composed, prepare_hydra, to_plain
from ders.cli.build import check, instantiate
from ders.reporting import read_record
from ders.reporting.figures import read_metrics
from ders.training import LanguageStage, schedule
from ders.training.checkpoints import steps_in
from ders.training.modules import LanguageModule

TASKS = {
    "general": ["model=moe_llava_phi", "data=llava_mix", "upcycling=moe_llava_original"],
    "medical": ["model=med_moe_stablelm", "data=medical_vqa"],
    "code": ["model=coder_moe", "data=evol_code"],
}
# Table S19: rate, batch per device × accumulation × devices, epochs.
S19 = {"general": (2e-5, (4, 4, 8), 1), "medical": (2e-5, (8, 2, 4), 9), "code": (5e-5, (4, 2, 8), 4)}
# The base codes, which the paper does not repeat.
BASE_CODE = {
    "general": {"router_loss_coef": 0.01, "group_by_modality_length": True, "train_rest": False},
    "medical": {"router_loss_coef": 0.0, "group_by_modality_length": False, "train_rest": False},
    "code": {"router_loss_coef": 0.01, "group_by_modality_length": False, "train_rest": True},
}
STEPS = [f"stage.{stage}.max_steps=2" for stage in ("tower", "projector", "finetune", "moe")]
SMALL = [*STEPS, "stage.moe.save_every=1", *(f"data.tiny.num_{split}=40" for split in ("train", "val", "test"))]


def stages(task: str, scale: str = "paper") -> dict[str, Any]:
    prepare_hydra()
    config = composed("train", [f"recipe={task}", *TASKS[task], f"scale={scale}"])
    return {name: instantiate(node) for name, node in config.stage.items()}


@pytest.mark.parametrize("task", TASKS)
def test_stage_3_is_that_of_table_s19(task: str) -> None:
    rate, (per_device, accumulate, devices), epochs = S19[task]
    stage = stages(task)["moe"]
    assert stage.optimizer.keywords["lr"] == rate
    assert stage.global_batch_size == per_device * accumulate * devices
    assert stage.on_devices(devices).accumulate == accumulate
    assert stage.num_epochs == epochs
    assert {key: getattr(stage, key) for key in BASE_CODE[task]} == BASE_CODE[task]
    expected = {"code": ("linear", 500, None)}.get(task, ("cosine", None, 1.0))
    keywords = stage.schedule.keywords
    assert (keywords["name"], keywords.get("warmup_steps"), stage.gradient_clip) == expected
    assert task == "code" or keywords["warmup_fraction"] == 0.03


def test_stages_before_the_third() -> None:
    general, code = stages("general"), stages("code")
    assert (general["projector"].trainable, general["projector"].split) == ("projector", "pretrain")
    assert (general["projector"].global_batch_size, general["projector"].optimizer.keywords["lr"]) == (256, 1e-3)
    assert (general["finetune"].trainable, general["finetune"].split) == ("all", "instruct")
    assert (general["finetune"].global_batch_size, general["finetune"].optimizer.keywords["lr"]) == (128, 2e-5)
    assert stages("medical")["finetune"].num_epochs == 3
    assert "raw language model" in code["finetune"].skip
    assert "pretrained" in general["tower"].skip
    assert all(stage.skip is None for stage in stages("general", "tiny").values())


def test_the_originals_capacity_and_noise() -> None:
    prepare_hydra()
    router = to_plain(composed("train", ["upcycling=moe_llava_original"]))["upcycling"]["router"]
    assert router["second_choice_noise"] is True
    assert (router["capacity_factor"], router["eval_capacity_factor"], router["min_capacity"]) == (1.5, 2.0, 0)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 64])
def test_the_global_batch_is_the_same_on_any_number_of_devices(world_size: int) -> None:
    stage = stages("general")["moe"].on_devices(world_size)
    assert stage.global_batch_size == 128
    assert stage.accumulate == max(32 // world_size, 1)
    assert 128 % (stage.accumulate * world_size) == 0


def test_devices_that_cannot_share_the_batch() -> None:
    with pytest.raises(ValueError, match="cannot be split into micro-batches of 4 rows on 3 devices"):
        stages("general")["moe"].on_devices(3)


class Rows:
    def split(self, name: str) -> range:
        return {"train": range(1001)}[name]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 8), (4, 32)])
def test_epochs_become_steps(epochs: int, steps: int) -> None:
    stage = LanguageStage(
        trainable="all", num_epochs=epochs, global_batch_size=128, optimizer=torch.optim.AdamW, schedule=schedule
    )
    assert stage.sized(Rows()).steps == steps == math.ceil(epochs * 1001 / 128)  # type: ignore[arg-type]
    assert stage.sized(Rows()).sized(Rows()).steps == steps  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [{}, {"max_steps": 3, "num_epochs": 1}])
def test_a_stage_has_one_length(length: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="max_steps optimizer steps or num_epochs epochs: set one"):
        LanguageStage(trainable="all", global_batch_size=8, optimizer=torch.optim.AdamW, schedule=schedule, **length)


def test_warm_up_by_steps() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warming = schedule(optimizer, 1000, name="linear", warmup_steps=500)
    rates = []
    for _ in range(1000):
        rates.append(warming.get_last_lr()[0])
        optimizer.step()
        warming.step()
    assert rates[250] == pytest.approx(0.5)
    assert rates[750] == pytest.approx(0.5)
    assert max(rates) == rates[500] == 1.0


@pytest.mark.parametrize(
    ("task", "method"),
    [("general", "vanilla"), ("medical", "ders_sm"), ("code", "ders_lm"), ("code", "dense"), ("medical", "extended")],
)
def test_a_tiny_twin_runs_its_recipe(task: str, method: str, run_job: Callable[..., Path]) -> None:
    dials = ["method=ders_sm", "extended=true"] if method == "extended" else [f"method={method}"]
    choices = [c for c in TASKS[task] if method != "dense" or not c.startswith("upcycling")]
    folder = run_job(f"recipe={task}", *choices, *SMALL, *dials, data=[])
    record = read_record(folder / "record.json")
    assert record["status"] == "finished"
    assert steps_in(folder / "checkpoints")
    assert (record["added_params_universal"] > 0) == (task != "general" and method not in ("dense", "extended"))
    assert (record["added_params"] > 0) == (method != "dense")


def test_table_5s_frozen_base_in_the_code_recipe(run_job: Callable[..., Path]) -> None:
    code = ["recipe=code", *TASKS["code"], *SMALL, "method=ders_sm"]
    counts = [
        read_record(run_job(*code, f"trainable={t}", data=[]) / "record.json") for t in ("paper", "frozen_shared")
    ]
    paper, frozen = counts
    assert paper["trainable_params"] == paper["total_params"]
    # Four layers of three 128 × 512 matrices are the shared base.
    assert paper["trainable_params"] - frozen["trainable_params"] == 4 * 3 * 128 * 512


def test_gradient_checkpointing_changes_nothing_and_grouping_runs(
    run_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    general = ["recipe=general", *TASKS["general"], *SMALL, "method=ders_lm"]
    plain = run_job(*general, data=[])
    switched: list[bool] = []
    training_step = LanguageModule.training_step

    def watched(self: LanguageModule, *arguments: Any) -> Any:
        switched.append(self.model.is_gradient_checkpointing)
        return training_step(self, *arguments)

    monkeypatch.setattr(LanguageModule, "training_step", watched)
    saving = run_job(*general, "stage.moe.gradient_checkpointing=true", data=[])
    assert switched == [True, True]
    for metric in ("train/loss", "train/router_loss"):
        assert read_metrics(saving / "metrics.csv")[metric] == read_metrics(plain / "metrics.csv")[metric]
    trained = [load_file(run / "model" / "model.safetensors") for run in (plain, saving)]
    routers = [name for name in trained[0] if "router" in name]
    assert len(routers) == 2
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in routers)
    grouped = run_job(*general, "stage.moe.group_by_modality_length=true", data=[])
    assert read_record(grouped / "record.json")["status"] == "finished"


def test_another_number_of_micro_batches_cannot_go_on(run_job: Callable[..., Path]) -> None:
    general = ["recipe=general", *TASKS["general"], *SMALL, "method=ders_lm", "stage.moe.accumulate=2"]
    folder = run_job(*general, "trainer.max_steps=1", data=[])
    file = steps_in(folder / "checkpoints")[1] / "checkpoint.json"
    content = json.loads(file.read_text())
    assert content["accumulate"] == 2
    file.write_text(json.dumps(content | {"accumulate": 4}))
    with pytest.raises(ValueError, match="with 4 micro-batches a step, and on these devices there are 2"):
        run_job(*general, "ckpt_path=last", data=[])


@pytest.mark.parametrize("task", TASKS)
def test_full_size_needs_a_recipe_of_full_size(task: str) -> None:
    prepare_hydra()
    with pytest.raises(UserError, match="a tiny recipe's: choose recipe=general, medical or code"):
        check(composed("train", [*TASKS[task], "scale=paper", "model.pretrained=false"]))
    check(composed("train", [*TASKS[task], f"recipe={task}", "scale=paper", "model.pretrained=false"]))
