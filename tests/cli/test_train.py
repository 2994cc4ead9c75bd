"""The train command, in smoke form."""

import csv
import gc
import json
import pydoc
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from conftest import ROOT, SMALL, SMALL_DATA

import ders
from ders.cli.app import UserError
from ders.cli.train import main
from ders.models.bundle import ModelBundle, load_bundle
from ders.moe import moe_layers
from ders.reporting.figures import read_metrics
from ders.training.modules import LanguageModule


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


@pytest.mark.parametrize("method", sorted(file.stem for file in (ROOT / "conf" / "method").glob("*.yaml")))
def test_a_run_folder_holds_everything(method: str, run_job: Callable[..., Path], capsys: Any) -> None:
    folder = run_job(f"method={method}")
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "record.json")
    assert {f.name for f in folder.iterdir()} >= {
        "config.yaml", "metrics.csv", "checkpoints", "model", "record.json", "figures", "predictions.jsonl"
    }  # fmt: skip
    record = record_of(folder)
    assert (record["status"], record["method"], record["seed"]) == ("finished", method, 0)
    assert record["config"] == yaml.safe_load((folder / "config.yaml").read_text())
    model = load_bundle(folder / "model").model
    counts = ders.count_parameters(model)
    assert record["total_params"] == counts.total_params
    assert record["added_params"] == counts.added_params
    assert record["stored_bytes"] == (folder / "model" / "model.safetensors").stat().st_size
    assert (record["added_params"] == 0) == (method == "dense")
    section = json.loads((folder / "model" / "config.json").read_text()).get("quantization_config")
    if method == "dense":
        assert section is None
    else:
        assert section["provenance"]["data_hash"] == record["data_hash"]
        assert (folder / "figures" / "expert_load.png").exists()
    with (folder / "metrics.csv").open(newline="") as rows:
        logged = {key for row in csv.DictReader(rows) for key, value in row.items() if value}
    assert {"train/loss", "val/accuracy"} <= logged


def test_what_trains_is_what_moves(run_job: Callable[..., Path], outputs: Path) -> None:
    folder = run_job("trainable=adapter", "seed=3")
    parent = Path(
        json.loads((folder / "model" / "config.json").read_text())["quantization_config"]["provenance"]["parent"]
    )
    before, after = (load_bundle(path).model.state_dict() for path in (parent, folder / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    deltas = [
        m for layer in moe_layers(load_bundle(folder / "model").model).values() for m in layer.experts.deltas.values()
    ]
    assert all(delta.values_EN.abs().sum() > 0 for delta in deltas)


@pytest.mark.parametrize("scored", ["ders.cli.parents.score", "ders.cli.train.score_folder"])
def test_nothing_of_training_is_in_memory_while_a_model_is_scored(
    scored: str, run_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    score = pydoc.locate(scored)
    alive: list[Any] = []

    def scoring(*arguments: Any) -> Any:
        kinds = (LanguageModule, torch.optim.Optimizer, lightning.Trainer)
        alive.append([type(thing) for thing in gc.get_objects() if issubclass(type(thing), kinds)])
        if isinstance(arguments[0], ModelBundle):
            assert all(p.grad is None for p in arguments[0].model.parameters())
        return score(*arguments)

    monkeypatch.setattr(scored, scoring)
    run_job("method=dense", f"parent_seed={len(scored)}")
    assert alive == [[]]


def test_one_parent_serves_all_methods_and_seeds(run_job: Callable[..., Path], outputs: Path) -> None:
    run_job("method=dense", "seed=1")
    run_job("method=ders_lm", "seed=2")
    parents = [f.name for f in (outputs / "cache" / "parents").iterdir() if not f.name.startswith(".")]
    run_job("method=vanilla", "seed=2")
    assert [f.name for f in (outputs / "cache" / "parents").iterdir() if not f.name.startswith(".")] == parents


def test_any_folder_can_be_the_parent(run_job: Callable[..., Path], outputs: Path) -> None:
    run_job()
    parent = next(f for f in (outputs / "cache" / "parents").iterdir() if not f.name.startswith("."))
    folder = run_job(f"parent={parent}")
    assert record_of(folder)["status"] == "finished"
    (outputs / "broken").mkdir(exist_ok=True)
    shutil.copytree(parent, outputs / "broken", dirs_exist_ok=True)
    weights = outputs / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated or not safetensors"):
        run_job(f"parent={outputs / 'broken'}")


@pytest.mark.parametrize(
    ("overrides", "data"),
    [
        (["model=tiny_lm", "data=digits_text"], ["data.num_train=64", "data.num_val=8", "data.num_test=8"]),
        (["data=easy_vqa"], ["data.num_train=64", "data.num_val=8", "data.num_test=8"]),
    ],
)
def test_other_models_and_data(overrides: list[str], data: list[str], run_job: Callable[..., Path]) -> None:
    record = record_of(run_job(*overrides, data=data))
    assert record["metrics"]["test/prior"]["count"] > 30


def test_own_files(run_job: Callable[..., Path], outputs: Path) -> None:
    run_job()
    # Other tests may have left the same questions in words, without images.
    written = (outputs / "cache" / "data").glob("digitsvqa-*/test.json")
    source = next(f.parent for f in written if len(rows := json.loads(f.read_text())) == 8 and "image" in rows[0])
    files = [f"data.{split}={source / f'{split}.json'}" for split in ("train", "test")]
    own = ["data=llava_files", *files, f"data.images={source / 'images'}", "data.image_size=16", "data.patch_size=8"]
    assert record_of(run_job(*own, data=[]))["metrics"]["test/accuracy"]["count"] == 48
    with pytest.raises(ValueError, match="missing below"):
        run_job(*own, f"data.images={outputs}", data=[])


def test_wandb_offline(run_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = run_job("logger=wandb", "seed=9")
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_a_finished_run_is_skipped_on_request_and_an_old_attempt_is_kept(run_job: Callable[..., Path]) -> None:
    folder = run_job("seed=10")
    stamp = (folder / "record.json").stat().st_mtime_ns
    run_job("seed=10", "skip_completed=true")
    assert (folder / "record.json").stat().st_mtime_ns == stamp
    run_job("seed=10")
    assert (folder / "previous" / "0" / "record.json").stat().st_mtime_ns == stamp


def test_checkpoints_that_do_not_fit(run_job: Callable[..., Path], tmp_path: Path) -> None:
    for given in ("last", "best"):
        with pytest.raises(UserError, match=r"no such checkpoint in .* Run without ckpt_path"):
            run_job("seed=11", f"ckpt_path={given}")
    checkpoint = run_job() / "checkpoints" / "step_000004"
    with pytest.raises(UserError, match=r"(?s)belongs to another configuration.*seed: 0 → 12"):
        run_job("seed=12", f"ckpt_path={checkpoint}")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        run_job(f"ckpt_path={tmp_path}")
    with pytest.raises(UserError, match="does not exist: give a folder"):
        run_job(f"ckpt_path={tmp_path / 'x'}")


def test_a_failed_run_leaves_a_record(
    run_job: Callable[..., Path], outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ders.training.checkpoints.save_bundle", no_space)
    with pytest.raises(OSError, match="No space left"):
        run_job("seed=13")
    record = next(r for f in outputs.glob("ders_sm-*") if (r := record_of(f))["seed"] == 13)
    assert (record["status"], record["stored_bytes"]) == ("failed", None)
    assert "No space left on device" in record["error"]
    assert "None was written before" in record["error"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sparsity=1.2"], "error: sparsity must be in [0, 1), the fraction of zeros: got 1.2"),
        (
            ["method=ders_lm", "sparsity=0.5"],
            "error: sparsity is a dial of method=ders_sm or method=ders_sm_fisher or method=ders_sm_rigl or "
            "compression=sparsify; method=ders_lm has rank. Drop sparsity=… or choose another",
        ),
        (["method=dense", "num_experts=8"], "method=dense has none of its own"),
        (["sparsty=0.5"], "error: there is no dial 'sparsty'"),
        (["method=magic"], "Could not find 'method/magic'"),
    ],
)
def test_errors_speak_to_the_person_at_the_keyboard(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert message in str(stopped.value)
    assert capsys.readouterr().out == ""


def test_errors_come_alone_and_at_once(train: Any) -> None:
    result = train("sparsity=1.2")
    assert (result.returncode, result.stdout) == (1, "")
    assert "error: sparsity must be in [0, 1)" in result.stderr
    assert "Traceback" not in result.stderr


def test_zero_3_on_two_processes(train: Any) -> None:
    folder = Path(train("trainer=deepspeed_zero3", "trainer.devices=2").stdout.splitlines()[-1]).parent
    record = record_of(folder)
    assert record["status"] == "finished"
    assert record["metrics"]["test/accuracy"]["count"] == 48
    checkpoint = folder / "checkpoints" / "step_000004"
    described = json.loads((checkpoint / "checkpoint.json").read_text())
    assert (described["state"], described["world_size"]) == ("zero3", 2)
    assert json.loads((folder / "checkpoints" / "best.json").read_text())["metric"] == "val/loss"
    assert len(list((checkpoint / "state").rglob("*_optim_states.pt"))) == 2
    assert load_bundle(checkpoint / "model").model.num_parameters() == record["total_params"]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3_offload", "fsdp2"])
def test_every_trainer_and_torchrun(trainer: str, outputs: Path, command: Any) -> None:
    dials = [*SMALL, *SMALL_DATA, f"output_dir={outputs}", f"trainer={trainer}", "trainer.devices=2", "seed=30"]
    launched = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    result = command(*launched, str(ROOT / "train.py"), *dials)
    assert result.returncode == 0, result.stderr[-3000:]
    (path,) = [line for line in result.stdout.splitlines() if line.endswith("record.json")]
    assert json.loads(Path(path).read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_sweep_of_two_process_runs(train: Any, run_job: Callable[..., Path]) -> None:
    result = train("-m", "sparsity=0.9,0.99", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    assert result.returncode == 0, result.stderr
    paths = result.stdout.splitlines()
    assert len(paths) == len(set(paths)) == 2  # a child that started the sweep again would print more
    for path, sparsity in zip(paths, [0.9, 0.99], strict=True):
        record = json.loads(Path(path).read_text())
        assert (record["status"], record["config"]["sparsity"]) == ("finished", sparsity)
        assert record["config"]["trainer"]["devices"] == 2
    # Two processes compute what one does on the same global batch.
    alone, together = (
        read_metrics(folder / "metrics.csv") for folder in (run_job("sparsity=0.9"), Path(paths[0]).parent)
    )
    for key in ("train/loss", "train/router_loss"):
        assert [v for _, v in together[key]] == pytest.approx([v for _, v in alone[key]], rel=1e-5)


def test_a_failing_job_stops_no_other_and_the_exit_code_tells(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = [*SMALL, *SMALL_DATA, f"output_dir={outputs}", "seed=14", "sparsity=1.5,0.99"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *arguments])
    with pytest.raises(SystemExit, match="sparsity must be in"):
        main()
    (path,) = capsys.readouterr().out.splitlines()
    assert json.loads(Path(path).read_text())["config"]["sparsity"] == 0.99


def test_a_new_delta_is_one_file_and_one_yaml(train: Any, tmp_path: Path) -> None:
    for name in ("src", "conf", "experiments", "train.py"):
        source = ROOT / name
        target = tmp_path / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (tmp_path / "src/ders/deltas/scaling.py").write_text(
        '''"""Each expert scales the rows of what it reads."""

import torch
from torch import nn

from ders.deltas.base import Delta


class DiagonalDelta(Delta):
    """The first min(O, I) entries of the diagonal, times a strength."""

    def __init__(self, num_experts, out_features, in_features, *, strength, seed=0):
        super().__init__(num_experts, out_features, in_features, seed=seed)
        self.strength = strength
        self.diagonal_EX = nn.Parameter(torch.zeros(num_experts, min(out_features, in_features)))

    def dense(self, expert):
        dense = self.diagonal_EX.new_zeros(self.out_features, self.in_features)
        return dense.diagonal_scatter(self.strength * self.diagonal_EX[expert])

    def forward(self, x_SI, expert_S):
        y_SX = x_SI[:, : self.diagonal_EX.shape[1]] * self.strength * self.diagonal_EX[expert_S]
        return nn.functional.pad(y_SX, (0, self.out_features - y_SX.shape[1]))

    def fit_expert_(self, expert, delta_OI):
        self.diagonal_EX.data[expert] = delta_OI.diagonal() / self.strength
'''
    )
    (tmp_path / "conf/method/diagonal.yaml").write_text(
        """# @package _global_
strength: 0.5
method:
  name: diagonal
  delta:
    _target_: ders.deltas.scaling.DiagonalDelta
    _partial_: true
    strength: ${strength}
"""
    )
    result = train("method=diagonal", "strength=2", root=tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads(Path(result.stdout.splitlines()[-1]).read_text())
    assert (record["status"], record["method"]) == ("finished", "diagonal")
    # Two layers of three matrices with four diagonals, and their routers.
    assert record["added_params"] == record["added_params_paper"] == 2 * (3 * 4 * 128 + 4 * 128)
    assert "DiagonalDelta strength 2" in result.stderr
    # The contract tests enrol it, too.
    shutil.copytree(ROOT / "tests" / "deltas", tmp_path / "tests" / "deltas")
    contract = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--rootdir={tmp_path}", "tests/deltas/test_contract.py", "-kdiagonal"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "src"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert contract.returncode == 0, contract.stdout
    assert " passed" in contract.stdout
