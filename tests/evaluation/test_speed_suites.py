"""The suites layer, decode and train on small shapes, from the command line to the figure."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from ders.cli import benchmark as command
from ders.cli.app import UserError, composed
from ders.evaluation import benchmark, decode_suite, generation, goals, layer_suite, model_memory, train_suite
from ders.evaluation.cells import DENSE, REBUILT, Cell, Stand
from ders.evaluation.layer_memory import activation_memory
from ders.evaluation.layers import LM, METHODS, SM, SPARSE, THIN, TWO_BITS, Mixture, Shape
from ders.evaluation.memory import in_fresh_process, saved_bytes
from ders.evaluation.peers import OURS
from ders.evaluation.roofline import Ceilings, ceilings, dense_work, shared_work, vanilla_work
from ders.evaluation.whole_models import VANILLA, Training, dense_model, make_form, random_batch
from ders.moe import moe_layers
from ders.reporting.benchmark import markdown

SHAPE = Shape(64, 128)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest grid: one shape, the smallest whole model."""
    monkeypatch.setattr(layer_suite, "TOKENS", {SHAPE: (1, 16, 256)})
    monkeypatch.setattr(layer_suite, "MEMORY_TOKENS", 1024)
    monkeypatch.setattr(layer_suite, "ceilings", functools.partial(ceilings, num_bytes=1 << 20, side=64))
    for module in (decode_suite, train_suite):
        monkeypatch.setattr(module, "MODELS_CPU", ("tiny_llava",))
    for module in (generation, train_suite):
        monkeypatch.setattr(module, "PROMPTS", ((1, 8), (2, 6)))
    monkeypatch.setattr(generation, "NEW_TOKENS", 2)
    monkeypatch.setattr(train_suite, "BATCH_CPU", (2, 8))


def run(suite: str, tmp_path: Path, capsys: Any) -> dict[str, Any]:
    overrides = [f"suite={suite}", f"results={tmp_path}", "format=json", "budget_seconds=1", "device=cpu"]
    command.run(composed("benchmark", overrides))
    (line,) = capsys.readouterr().out.splitlines()
    record: dict[str, Any] = json.loads(line)
    folder = tmp_path / f"benchmark_{suite}"
    assert record == json.loads((folder / "record.json").read_text())
    assert (folder / "table.md").read_text() == markdown(record)
    assert (folder / "figure.png").stat().st_size > 10_000
    assert record["command"] == f"python scripts/benchmark.py suite={suite} device=cpu budget_seconds=1"
    assert record["commit"]
    assert record["dials"]["dtype"] == "float32"
    for goal in record["goals"]:
        assert goal["met"] == (goal["figure"] <= goal["limit"])
    return record


@pytest.mark.usefixtures("small")
def test_the_layer_suite(tmp_path: Path, capsys: Any) -> None:
    record = run("layer", tmp_path, capsys)
    cells = {(row["tokens"], row["direction"]) for row in record["rows"]}
    assert cells == {*((t, goals.FORWARD) for t in (1, 16, 256)), (256, goals.BOTH)}
    here = [row for row in record["rows"] if (row["tokens"], row["direction"]) == (256, goals.FORWARD)]
    assert {row["method"] for row in here} >= {DENSE, REBUILT, OURS, "vanilla: plain loop", *METHODS}
    assert {row["method"] for row in here} >= {f"vanilla: HF {name}" for name in ("eager", "batched_mm", "grouped_mm")}
    assert sum(row.get("best", False) for row in here) == 1
    for row in record["rows"]:
        assert row["ms"] > 0
        assert row["cpu_ms"] > 0
        assert row["rounds"] >= 2
        assert row["of_roofline"] > 0
        assert row["error"] is None or row["error"] < 1e-6
        if row["role"] != "dense":
            assert row["to_dense"]["low"] <= row["to_dense"]["median"] <= row["to_dense"]["high"]
    assert all(row["error"] is not None for row in record["rows"] if row["role"] in ("dense", "method"))
    assert all(place["reason"] and place["cells"] for place in record["unavailable"])
    assert {row["method"] for row in record["memory"]} == {DENSE, OURS, *THIN}
    figures = {goal["goal"].split(": ")[1] for goal in record["goals"]}
    assert figures >= {"relative error to float64, float32", "error over dense's, bfloat16"}
    assert sum("activation memory" in goal["goal"] for goal in record["goals"]) == 2


@pytest.mark.usefixtures("small")
def test_the_decode_suite(tmp_path: Path, capsys: Any) -> None:
    record = run("decode", tmp_path, capsys)
    assert {(row["tokens"], row["direction"]) for row in record["rows"]} == {(t, goals.FORWARD) for t in (1, 16)}
    assert {(row["phase"], row["batch"]) for row in record["models"]} == {
        (phase, batch) for phase in ("prefill", "decode") for batch in (1, 2)
    }
    sizes = {row["method"]: row["weight_bytes"] for row in record["models"]}
    assert set(sizes) == {DENSE, VANILLA, *METHODS}
    assert sizes[DENSE] < sizes[SM] < sizes[TWO_BITS] < sizes[VANILLA]


@pytest.mark.usefixtures("small")
def test_the_train_suite(tmp_path: Path, capsys: Any) -> None:
    record = run("train", tmp_path, capsys)
    assert {row["phase"] for row in record["models"]} == {"prefill", "decode", "training step"}
    steps = [row for row in record["models"] if row["phase"] == "training step"]
    assert sorted(row["method"] for row in steps) == sorted([DENSE, VANILLA, *METHODS])
    assert all(row["tokens_per_second"] == pytest.approx(16 / row["ms"] * 1e3, rel=1e-2) for row in steps)
    state = {row["method"]: row["state_to_dense"] for row in record["memory"]}
    assert 1 < state[SM] < state[LM] < 1.02 < state[VANILLA]
    assert {goal["goal"] for goal in record["goals"]} == {
        f"{method}, tiny_llava: training state over dense" for method in THIN
    }


def test_without_hydra(tmp_path: Path) -> None:
    """As on a machine that lacks it: nothing that only the command line, the data or the training floor needs."""
    code = f"""
import sys
for name in ("hydra", "omegaconf", "lightning", "datasets", "wandb"):
    sys.modules[name] = None
from ders.evaluation import benchmark, decode_suite, layer_suite
from ders.evaluation.layers import Shape
layer_suite.TOKENS = {{Shape(64, 128): (1,)}}
decode_suite.MODELS_CPU = ()
sys.argv = ["benchmark", "suite=decode", "device=cpu", "budget_seconds=0.5", "output={tmp_path}"]
benchmark.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line) == json.loads((tmp_path / "record.json").read_text())
    assert (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["suite"], "expected key=value: got 'suite'"),
        (["speed=1"], "unknown key 'speed': there are suite, format, output, grid, device"),
        (["budget_seconds=soon"], "budget_seconds must be a number of seconds: got 'soon'"),
        (["format=xml"], "format must be table or json: got 'xml'"),
    ],
)
def test_bad_words(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.parse(words)


def test_bad_values() -> None:
    with pytest.raises(UserError, match="compress, equivalence, zero_memory, layer, decode, train: got 'speed'"):
        command.run(composed("benchmark", ["suite=speed"]))
    with pytest.raises(ValueError, match="grid must be one of default, full: got 'half'"):
        command.run(composed("benchmark", ["suite=layer", "grid=half"]))
    with pytest.raises(ValueError, match="suite must be one of layer, decode, train: got 'speed'"):
        benchmark.run_suite("speed", {}, ROOT)


@pytest.mark.parametrize("shape", [SHAPE, Shape(64, 96, gated=False)])
@pytest.mark.parametrize("mixture", [Mixture(), Mixture(experts=8), Mixture(top_k=1)])
def test_all_vanilla_layers_compute_the_same(shape: Shape, mixture: Mixture) -> None:
    stand = Stand(shape, mixture, "cpu", torch.float32)
    good, why, errors = stand.check_peers(33, stand.exact([5, 33])[33])
    missing = {"vanilla: ScatterMoE", "vanilla: MegaBlocks"} | (set() if shape.gated else {"vanilla: HF eager"})
    assert set(why) <= missing | {"vanilla: DeepSpeed"}
    assert OURS in good
    assert max(errors.values()) < 1e-6
    assert stand.hit(33) == mixture.experts


def test_the_gradients_are_checked_too() -> None:
    stand = Stand(SHAPE, Mixture(), "cpu", torch.float32, peers=False)
    cell = Cell(SHAPE, Mixture(), 33, backward=True, methods=(SM, LM, SPARSE))
    assert max(stand.errors([cell])[cell].values()) < 1e-6
    layer = stand.methods[SM]
    run = layer.experts.forward
    layer.experts.forward = lambda *a, **k: run(*a, **k) * 1.01
    assert stand.errors([cell])[cell][SM] == pytest.approx(0.01, rel=0.1)


def test_deltas_are_as_large_as_training_leaves_them() -> None:
    stand = Stand(SHAPE, Mixture(), "cpu", torch.float32)
    base = stand.dense.up_proj.weight.detach()
    for method, scale in [(LM, 0.02), (TWO_BITS, 0.02), (SPARSE, 0.02 * 0.1**0.5)]:
        delta = stand.methods[method].experts.deltas["up_proj"].dense(1).detach()
        assert float(delta.square().mean().sqrt() / base.std()) == pytest.approx(scale, rel=0.3)
    moved = stand.peers[OURS].effective_weight("up_proj", 3).detach() - base
    assert float(moved.std() / base.std()) == pytest.approx(0.02, rel=0.1)


def test_work() -> None:
    stand, limits = Stand(SHAPE, Mixture(), "cpu", torch.float32, peers=False), Ceilings(2.0, 1.0, 10.0)
    weights = 3 * 64 * 128
    dense = dense_work(SHAPE, 5, torch.float32, backward=False)
    assert (dense.flops, dense.weight_bytes) == (2 * 5 * weights, 4 * weights)
    vanilla = vanilla_work(SHAPE, Mixture(), 5, torch.float32, 3, backward=False)
    assert (vanilla.flops, vanilla.weight_bytes) == (2 * dense.flops, 3 * dense.weight_bytes)
    two_bits = stand.methods[TWO_BITS]
    shared = shared_work(two_bits, SHAPE, Mixture(), 5, torch.float32, 4, backward=False)
    assert shared.flops == 3 * dense.flops
    assert shared.weight_bytes == pytest.approx(dense.weight_bytes * (1 + 4 * 2 / 32), rel=0.1)  # and the grids
    assert dense.seconds(limits, 10.0) == 4 * weights + 10


def test_saved_bytes() -> None:
    layer = torch.nn.Linear(7, 5)
    x = torch.randn(3, 7, requires_grad=True)
    assert saved_bytes(layer, lambda: layer(x)) == x.nbytes
    assert saved_bytes(layer, lambda: layer(x).exp()) == x.nbytes + 3 * 5 * 4


def test_activation_memory_is_that_of_the_tensors() -> None:
    """512 tokens of 64 × 512: the dense FFN keeps four tensors of 1 MiB and its input."""
    dense, vanilla, _ = activation_memory(Shape(64, 512), Mixture(), 512, "cpu", torch.float32, (SM,))
    kept = 512 * (4 * 512 + 64) * 4
    assert dense["saved_bytes"] == kept
    assert dense["peak_bytes"] == pytest.approx(1.5 * kept, rel=0.35)
    assert 1.5 < vanilla["peak_bytes_to_dense"] < 3


def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"measuring memory failed \(1\): (?s:.*)KeyError: 'nothing'"):
        in_fresh_process(model_memory.__name__, {"model": "nothing", "device": "cpu", "dtype": "float32"})


def test_whole_models() -> None:
    dense = dense_model("tiny_llava", "cpu", torch.float32)
    batch = random_batch(dense, 2, 8)
    for form in (VANILLA, *METHODS):
        model = make_form(dense, form)
        assert len(moe_layers(model)) == 2
        training = Training(model, batch)
        before = [p.detach().clone() for p in training.trained]
        training.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, training.trained, strict=True))
        assert all(p.grad is None for p in training.trained)
    params = sum(p.numel() for p in dense.parameters())
    assert Training(dense, batch).state_bytes() <= 16 * params + 10_000
