"""The commands on a real small run: compress, score, analyse, and what goes wrong on the way."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL_DATA
from hydra.errors import HydraException

from ders.cli import compress
from ders.cli import eval as evaluate
from ders.cli.app import UserError, composed
from ders.models.bundle import load_bundle
from ders.reporting import read_record

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkpoint(run_job: Callable[..., Path]) -> Path:
    return run_job("method=vanilla", "skip_completed=true") / "model"


@pytest.fixture
def compressed(command: Command, checkpoint: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def start(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        script = str(ROOT / "scripts" / "compress.py")
        return command(script, f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}", *arguments, **options)

    return start


def test_compress_and_score(compressed: Command, command: Command, tmp_path: Path, outputs: Path) -> None:
    done = compressed("compression=quantize", "bits=2", "format=json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["compression"] == "quantize"
    assert result["ratio"] == (result["base_bytes"] + result["delta_bytes"]) / result["expert_bytes"] < 0.385
    assert result["stored_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert "compressing: 100 %" in done.stderr
    scored = command(
        str(ROOT / "scripts" / "eval.py"),
        f"checkpoint={tmp_path / 'out'}",
        f"output_dir={outputs}",
        "format=json",
        "data=digits_vqa",
        *SMALL_DATA,
    )
    assert scored.returncode == 0, scored.stderr
    (line,) = scored.stdout.splitlines()
    metrics = json.loads(line)
    assert metrics["count"] == 48
    assert 0 <= metrics["test/accuracy"] <= 1
    assert 0 < metrics["test/prior"] < 1
    assert metrics["stored_bytes"] == result["stored_bytes"]


def test_the_table_is_for_people(compressed: Command) -> None:
    done = compressed("compression=sparsify", "sparsity=0.9")
    assert (
        "2 MoE layers of 4 experts → SparseDelta sparsity 0.9 selection random rescale True: experts 6.29 MB"
        in done.stdout
    )
    assert "9.54 MB → " in done.stdout


def test_a_fresh_process_generates_the_same_tokens(compressed: Command, tmp_path: Path) -> None:
    """Only `import ders, transformers`."""
    assert compressed("compression=sparsify", "sparsity=0.9", "selection=magnitude").returncode == 0
    bundle = load_bundle(tmp_path / "out")
    ids = torch.tensor([[1, 7, 9, 12, 15]])
    own = bundle.model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    code = (
        "import ders, transformers, torch, sys\n"
        "m = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype='auto')\n"
        "ids = torch.tensor([[1, 7, 9, 12, 15]])\n"
        "print(m.generate(input_ids=ids, max_new_tokens=12, do_sample=False).tolist())\n"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert json.loads(fresh.stdout) == own.tolist(), fresh.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "You must specify 'compression'"),
        (("compression=quantize", "bits=5"), "bits must be 1, 2, 3, 4 or 8: got 5"),
        (("compression=svd", "rank=1000"), "rank must be between 1 and 128"),
        (("compression=svd", "base=/nowhere"), "/nowhere: no such folder"),
        (("compression=svd", "extended=true"), "needs a universal FFN"),
        (("compression=svd", "checkpoint=/nowhere"), "/nowhere: no such folder"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(
    checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises((HydraException, ValueError, UserError), match=message):
        compress.run(composed("compress", [f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}", *arguments]))
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_ends_the_command_with_a_message(compressed: Command, tmp_path: Path) -> None:
    done = compressed("compression=quantize", "sparsity=0.5")
    assert done.returncode == 1
    assert "error: sparsity is a dial of method=ders_sm or " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_lost_parent(checkpoint: Path, tmp_path: Path) -> None:
    def start(*arguments: str) -> None:
        compress.run(composed("compress", [f"checkpoint={checkpoint}", "compression=svd", "rank=1", *arguments]))

    config = checkpoint / "config.json"
    text = config.read_text()
    parent = json.loads(text)["quantization_config"]["provenance"]["parent"]
    try:
        config.write_text(text.replace(parent, "/gone"))
        with pytest.raises(UserError, match=r"came from /gone, which is not there any more: .* base=DIR, or base=mean"):
            start(f"output={tmp_path / 'a'}")
        start(f"output={tmp_path / 'b'}", f"base={parent}")
        with pytest.warns(UserWarning, match="base=mean: deltas are taken from the mean"):
            start(f"output={tmp_path / 'c'}", "base=mean")
    finally:
        config.write_text(text)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["b", "c"]


def test_a_full_disk(compressed: Command, tmp_path: Path) -> None:
    """A limit on the size of files: the writing itself fails in the middle, as it does on a full disk."""
    import resource

    done = compressed(
        "compression=quantize",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_kill_in_the_middle(checkpoint: Path, compressed: Command, tmp_path: Path) -> None:
    code = (
        "import os, signal, functools, sys, json, ders\n"
        "def progress(done, total):\n"
        "    if done > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "parent = json.load(open(sys.argv[1] + '/config.json'))['quantization_config']['provenance']['parent']\n"
        "delta = functools.partial(ders.QuantizedDelta, bits=2)\n"
        "ders.compress_folder(sys.argv[1], sys.argv[2], base=parent, delta=delta, progress=progress)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert compressed("compression=quantize").returncode == 0  # starts clean
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_existing_output(compressed: Command, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("1")
    done = compressed("compression=svd")
    assert done.returncode == 1
    assert "exists already" in done.stderr
    assert (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "does not say which data it was trained on: choose data="),
        (("split=all",), "split must be test or val: got 'all'"),
        (("dtype=int8",), "dtype must be one of auto, float32"),
        (("checkpoint=/nowhere",), "config.json: missing or unreadable"),
    ],
)
def test_eval_names_what_it_does_not_know(
    checkpoint: Path, outputs: Path, arguments: tuple[str, ...], message: str
) -> None:
    parent = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["provenance"]["parent"]
    with pytest.raises((ValueError, UserError), match=message):
        evaluate.run(composed("eval", [f"checkpoint={parent}", f"output_dir={outputs}", *arguments]))


def test_a_compression_row(run_job: Callable[..., Path], checkpoint: Path) -> None:
    """A row of a table: the cached vanilla run of that seed, compressed and scored."""
    folder = run_job("method=vanilla", "compression=quantize", "bits=4")
    record, vanilla = read_record(folder / "record.json"), read_record(checkpoint.parent / "record.json")
    assert record["status"] == "finished"
    assert record["method"] == "vanilla"
    assert record["config"]["compression"]["name"] == "quantize"
    assert record["date"] >= vanilla["date"]
    assert record["stored_bytes"] == (folder / "model" / "model.safetensors").stat().st_size < vanilla["stored_bytes"]
    assert record["expert_bytes"] < record["stored_bytes"]
    assert record["metrics"]["vanilla/accuracy"] == vanilla["metrics"]["test/accuracy"]
    assert record["metrics"]["test/prior"] == vanilla["metrics"]["test/prior"]
    assert record["trainable_params"] == vanilla["trainable_params"]
    # Codes count k/16 each, as in the paper: 2 layers of 4 experts of 3 matrices, and the routers.
    assert record["added_params"] == 2 * 4 * 3 * 128 * 512 * 4 // 16 + 2 * 4 * 128
    assert (folder / "predictions.jsonl").exists()


def test_a_compression_row_trains_its_vanilla_run_first(train: Command, outputs: Path) -> None:
    done = train("method=vanilla", "seed=5", "compression=sparsify", "sparsity=0.5")
    assert done.returncode == 0, done.stderr
    first, second = (Path(line) for line in done.stdout.splitlines())
    vanilla, record = read_record(first), read_record(second)
    assert "compression" not in vanilla["config"]
    assert "sparsity" not in vanilla["config"]
    assert "compression=sparsify" not in vanilla["command"]
    assert "compression=sparsify" in record["command"]
    again = train("method=vanilla", "seed=5")
    assert Path(again.stdout.splitlines()[-1]) == first  # the very run that `method=vanilla` makes
