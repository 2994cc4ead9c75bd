"""The planning command: what it prints, what it refuses, what it never imports."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from hydra.errors import HydraException

import ders
from ders.cli.app import UserError, composed, prepare_hydra
from ders.cli.instantiation import instantiate
from ders.cli.plan import plan, run
from ders.cli.plan_table import count, size
from ders.compression import compress_folder
from ders.models.bundle import stored_bytes
from ders.reporting.record import read_record

TINY = ["scale=tiny", "model=tiny_lm", "dtype=float32"]
COUNTS = ("added_params", "added_params_universal", "added_params_paper", "total_params", "active_params")


@pytest.fixture
def planned() -> Callable[..., dict[str, Any]]:
    prepare_hydra()
    return lambda *overrides: plan(composed("plan", list(overrides)))


@pytest.fixture
def printed(capsys: Any) -> Callable[..., str]:
    prepare_hydra()

    def start(*overrides: str) -> str:
        run(composed("plan", list(overrides)))
        return str(capsys.readouterr().out)

    return start


def tiny_lm() -> Any:
    torch.manual_seed(0)
    return instantiate(composed("plan", TINY).model).dense()


def test_the_numbers_of_the_built_model(planned: Any, tmp_path: Path) -> None:
    found = planned(*TINY, "method=ders_lm", "rank=2", "trainable=adapter")
    model = tiny_lm()
    ders.upcycle(model, delta=instantiate(composed("plan", [*TINY, "method=ders_lm", "rank=2"]).method)["delta"])
    assert found["trainable_params"] == ders.set_trainable(model, "adapter")
    counts = ders.count_parameters(model)
    assert {key: found[key] for key in COUNTS} == {key: getattr(counts, key) for key in COUNTS}
    model.save_pretrained(tmp_path)
    assert found["stored_bytes"] == stored_bytes(tmp_path)
    assert list(found["columns"]) == ["dense", "vanilla", "ders_lm"]
    assert found["columns"]["vanilla"]["trainable_params"] is None  # full experts over no shared base


def test_a_compression(planned: Any, tmp_path: Path) -> None:
    choice = ["method=vanilla", "compression=quantize", "bits=3"]
    found = planned(*TINY, *choice)
    model = tiny_lm()
    model.save_pretrained(tmp_path / "parent")
    ders.upcycle(model)
    trained = ders.set_trainable(model, "paper")
    model.save_pretrained(tmp_path / "moe")
    delta = instantiate(composed("plan", [*TINY, *choice]).compression)["delta"]
    compress_folder(tmp_path / "moe", tmp_path / "out", base=tmp_path / "parent", delta=delta)
    assert found["stored_bytes"] == stored_bytes(tmp_path / "out")
    assert found["trainable_params"] == trained  # it is trained before it is compressed
    assert list(found["columns"]) == ["dense", "vanilla", "vanilla + quantize"]


def test_json_is_one_object_with_the_keys_of_a_record(printed: Any) -> None:
    (line,) = printed(*TINY, "format=json").splitlines()
    found = json.loads(line)
    record = read_record(next((ROOT / "results" / "methods").glob("ders_sm-*.json")))
    shared = (*COUNTS, "trainable_params", "stored_bytes")
    assert all(type(found[key]) is type(record[key]) for key in shared)
    assert found["columns"]["ders_sm"].items() >= {key: found[key] for key in shared}.items()
    states = found["columns"]["dense"]["state_bytes"]
    assert list(states)[:3] == ["ddp", "zero_1", "zero_1_offload"]
    assert states["zero_3"]["gpu"] < states["zero_2"]["gpu"] < states["zero_1"]["gpu"] < states["ddp"]["gpu"]


def test_the_table_has_every_row(printed: Any) -> None:
    table = printed("model=moe_llava_phi", "method=ders_sm", "sparsity=0.9999")
    cells = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in table.splitlines() if "│" in line}
    assert [cell.strip() for cell in cells["added as the paper counts"]] == ["0", "2.52 B", "1.11 M"]
    assert {"stored", "ZeRO 0, as DDP", "ZeRO 3, offload", "activations (estimate)", "weights read", "FLOPs"} <= set(
        cells
    )
    assert "moe_llava_phi, ders_sm" in table


def test_dense_has_one_column(planned: Any) -> None:
    found = planned(*TINY, "method=dense")
    assert list(found["columns"]) == ["dense"]
    assert found["added_params"] == 0


def test_extended(planned: Any) -> None:
    found = planned("scale=tiny", "model=coder_moe", "method=ders_lm", "extended=true")
    assert found["added_params_universal"] == 0
    assert found["columns"]["vanilla"]["added_params_universal"] == 4 * 3 * 128 * 512


@pytest.mark.parametrize(
    ("choice", "dial"),
    [
        (["method=ders_sm"], "sparsity"),
        (["method=ders_lm"], "rank"),
        (["method=vanilla", "compression=sparsify"], "sparsity"),
        (["method=vanilla", "compression=quantize"], "bits"),
    ],
)
def test_the_mildest_setting_within_a_budget(planned: Any, choice: list[str], dial: str) -> None:
    budget = 5.5 / 1024
    found = planned(*TINY, *choice, f"budget_gib={budget}")
    chosen = found["setting"][dial]
    assert found["stored_bytes"] <= budget * 2**30
    assert planned(*TINY, *choice, f"{dial}={chosen}")["stored_bytes"] == found["stored_bytes"]
    milder = {"sparsity": round(chosen - 1e-4, 6), "rank": chosen + 1, "bits": 8 if chosen == 4 else 4}[dial]
    assert planned(*TINY, *choice, f"{dial}={milder}")["stored_bytes"] > budget * 2**30


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=tiny_lm"], "scale=paper: this model has one size: set scale=tiny"),
        (["model=moe_llava_phi", "scale=huge"], "scale must be tiny or paper: got 'huge'"),
        ([*TINY, "dtype=int8"], "dtype must be one of bfloat16, float16, float32: got 'int8'"),
        ([*TINY, "gpus=0"], "gpus must be a whole number from 1 on: got 0"),
        ([*TINY, "num_experts=2.5"], "num_experts must be a whole number"),
        ([*TINY, "sparsity=1.5"], r"sparsity must be in \[0, 1\)"),
        ([*TINY, "top_k=5"], "top_k must be between 1 and num_experts=4"),
        ([*TINY, "trainable=some"], "trainable must be one of"),
        ([*TINY, "format=xml"], "format must be table or json"),
        ([*TINY, "compression=quantize"], "takes the full experts of method=vanilla: got method=ders_sm"),
        ([*TINY, "method=vanilla", "budget_gib=1"], "looks for a setting of sparsity, bits or rank"),
        ([*TINY, "budget_gib=0.001"], r"budget_gib=0.001: does not fit: even sparsity=0.99998\d takes 0.00\d GiB"),
        ([*TINY, "method=vanilla", "compression=base_only", "budget_gib=1"], "this one has none"),
        (["scale=tiny", "model=coder_moe", "method=vanilla", "extended=true"], "extended=true makes the universal FFN"),
        ([*TINY, "rank=2"], "Could not override 'rank'"),
        ([], "You must specify 'model'"),
        (["model=tiny_lm", "scale=tiny", "method=dense", "upcycling=med_moe"], "method=dense has no experts"),
        (["model=moe_llava_phi", "budget_gib=inf"], "budget_gib must be a finite number"),
        (["model=moe_llava_phi", "trainable=tower"], "trainable must be one of paper, frozen_shared, adapter, all"),
        (["model=moe_llava_phi", "sparsity=1.5", "budget_gib=9"], r"^sparsity must be in \[0, 1\)"),
    ],
)
def test_mistakes_are_told(planned: Any, overrides: list[str], message: str) -> None:
    with pytest.raises((UserError, ValueError, HydraException), match=message):
        planned(*overrides)


def test_the_command_imports_no_trainer_and_ends_in_time(tmp_path: Path) -> None:
    code = (
        "import json, re, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "print(json.dumps([sorted(names & {'lightning', 'deepspeed', 'datasets', 'wandb', 'matplotlib'}), "
        # Not getrusage, which remembers the process that started this one.
        "int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])]), file=sys.stderr)\n"
    )
    arguments = [str(ROOT / "scripts" / "plan.py"), "model=llama_3_70b", "method=ders_sm", "format=json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["columns"]["dense"]["total_params"] == 70_553_706_496
    imported, peak_kib = json.loads(done.stderr.splitlines()[-1])
    assert imported == []
    assert peak_kib < 2**20  # one GiB


@pytest.mark.parametrize("model", ["llama_3_70b", "qwen2_5_72b"])
def test_large_models_have_their_published_size(planned: Any, model: str) -> None:
    total = {"llama_3_70b": 70_553_706_496, "qwen2_5_72b": 72_706_203_648}[model]
    assert planned(f"model={model}", "method=dense")["total_params"] == total


def test_units() -> None:
    assert [count(n) for n in (None, 1234, 264_000, 2.4e8, 7e10, 2e12)] == [
        "–",
        "1,234",
        "0.26 M",
        "0.24 B",
        "70.00 B",
        "2.00 T",
    ]
    assert [size(n) for n in (None, 512, 2**20, 3 * 2**29)] == ["–", "0.50 KiB", "1.00 MiB", "1.50 GiB"]


def test_the_code_recipe_trains_the_rest_too(planned: Any) -> None:
    arguments = ("model=coder_moe", "method=ders_lm", "rank=4")
    assert planned(*arguments, "train_rest=true")["trainable_params"] == planned(*arguments)["total_params"]
