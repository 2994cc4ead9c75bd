"""Every command of the README runs, in smoke form, and every number in it comes from `results/`."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, SMALL_DATA, why_no_sandbox

import ders
from ders.cli.app import composed, prepare_hydra, to_plain
from ders.reporting.identity import run_folder

README = (ROOT / "README.md").read_text()
BLOCKS = {language: re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("bash", "python")}
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS["bash"] for line in block.splitlines() if line.strip()]
TRAIN = [c for c in COMMANDS if c.startswith("python train.py") and not re.search("trainer=d|hydra/launcher=", c)]
TABLES = [c for c in COMMANDS if c.startswith("python scripts/tables.py")]
PLANS = [c for c in COMMANDS if c.startswith("python scripts/plan.py")]
CHECKS = [c for c in COMMANDS if c.startswith("python scripts/data.py")]
# The paper's data sets hold two sizes.
PAPER_DATA = ("data=llava_mix", "data=medical_vqa", "data=evol_code")
SMALL_SETS = [f"data.tiny.num_{split}=32" for split in ("train", "val", "test")]
FOLDERS = [c for c in COMMANDS if re.match(r"python scripts/(analyze|compress|eval|export)\.py ", c)]


def test_no_command_is_left_out() -> None:
    # Their processes: tests/cli/test_train.py
    many = [f"python train.py trainer={name} trainer.devices=2" for name in ("ddp", "deepspeed_zero3")]
    # A launcher's processes: tests/cli/test_sweeps.py
    launched = ["python train.py -m hydra/launcher=joblib hydra.launcher.n_jobs=2 method=ders_sm,ders_lm"]
    # In small: tests/evaluation/test_*_suite*.py
    suites = ("layer", "decode", "train", "compress", "equivalence", "zero_memory")
    slow = [*(f"python scripts/benchmark.py suite={suite}" for suite in suites), "python scripts/faults.py kills=36"]
    known = [*TRAIN, *TABLES, *FOLDERS, *PLANS, *CHECKS, *many, *launched, *slow, "make train", "make test"]
    assert sorted(COMMANDS) == sorted(known)
    assert len(TRAIN) > 8


@pytest.mark.parametrize("target", ["train", "test"])
def test_make_targets(target: str) -> None:
    planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"train": "python train.py", "test": "python -m pytest"}[target] in planned


def slow_if_real(command: str) -> Any:
    """135 million parameters take their time even in two steps."""
    return pytest.param(command, marks=pytest.mark.slow) if "model=smol" in command else command


@pytest.mark.parametrize("command", map(slow_if_real, TRAIN))
def test_train_commands(command: str, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from ders.cli.train import main

    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = shlex.split(command)[2:]
    flags, dials = ([a for a in arguments if a.startswith("-") is flag] for flag in (True, False))
    claim = next((d.split("=")[1] for d in dials if d.startswith("experiments=")), "")
    if claim == "table_3":  # its other rows: tests/training/test_recipes.py
        dials = [*dials, "data=evol_code"]
        flags = [*flags, 'hydra.sweeper.runs=["method=vanilla","method=vanilla compression=base_only"]']
    if "hparams_search=optuna" in dials:
        dials = [*dials, "hydra.sweeper.n_trials=2"]
    one_seed = ["seed=0"] if claim else []
    of_the_paper = claim == "table_3" or any(d in dials for d in PAPER_DATA)
    smoke = [*SMALL, *(SMALL_SETS if of_the_paper else SMALL_DATA), f"output_dir={outputs}", *one_seed]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, *smoke, *dials])
    main()
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert paths
    assert all(path.name == "record.json" and path.exists() for path in paths)


def test_commands_on_folders(
    run_job: Callable[..., Path], outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """In the order they stand there, on a small run in the place of the full one."""
    prepare_hydra()
    default = run_folder(to_plain(composed("train", ["method=vanilla"])), ROOT).relative_to(ROOT)
    small = run_job("method=vanilla", "skip_completed=true")
    monkeypatch.chdir(tmp_path)
    assert len(FOLDERS) > 5
    for command in FOLDERS:
        _, script, *arguments = shlex.split(command)
        assert {f"checkpoint={default}", "checkpoint=two_bits"} & set(arguments)
        arguments = [argument.replace(str(default), str(small)) for argument in arguments]
        if "evaluation=humaneval" in arguments:
            if why_no_sandbox():
                continue
            arguments += ["evaluation.num_problems=2", "evaluation.max_new_tokens=2"]
        elif "eval.py" in script:
            arguments += [f"output_dir={outputs}", "data=digits_vqa", *SMALL_DATA]
        if "analyze.py" in script:
            arguments += [f"output={tmp_path / 'analysis'}"]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        importlib.import_module(f"ders.cli.{Path(script).stem}").main()
    written = {"sparse", "two_bits", "low_rank", "stock", "analysis"} | (
        {"programs.jsonl"} if not why_no_sandbox() else set()
    )
    assert written == {entry.name for entry in tmp_path.iterdir()}
    assert "QuantizedDelta bits 2" in capsys.readouterr().out


@pytest.mark.parametrize("command", PLANS)
def test_plan_commands(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from ders.cli.plan import main

    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    main()
    assert "ZeRO 3" in capsys.readouterr().out


@pytest.mark.parametrize("command", CHECKS)
def test_check_commands(command: str, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from ders.cli.data import main

    monkeypatch.setattr(sys, "argv", [*shlex.split(command)[1:], *SMALL_SETS, f"output_dir={outputs}"])
    main()
    assert "every row can be used" in capsys.readouterr().out


@pytest.mark.parametrize("command", TABLES)
def test_tables_commands(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ders.cli.tables import main

    results = tmp_path / "results"
    shutil.copytree(ROOT / "results", results)
    for table in results.rglob("table.md"):
        table.unlink()
    monkeypatch.setattr(sys, "argv", [*shlex.split(command)[1:], f"results={results}", f"output_dir={tmp_path}"])
    main()
    built = {table.parent.name: table.read_text() for table in results.rglob("table.md")}
    claim = re.search(r"claim=(\w+)", command)
    assert (claim[1] if claim else "methods") in built
    assert built == {name: (ROOT / "results" / name / "table.md").read_text() for name in built}


def test_the_tables_are_those_of_results() -> None:
    shown = re.findall(r"<!-- (table|goals):(\w+) -->\n(.*?)<!-- /table -->", README, re.DOTALL)
    speed, trust = ["benchmark_layer", "benchmark_decode"], ["benchmark_equivalence", "benchmark_zero_memory", "faults"]
    assert [name for _, name, _ in shown] == ["methods", "benchmark_compress", *speed, "table_1", *trust]
    for part, name, text in shown:
        assert text == (ROOT / "results" / name / f"{part}.md").read_text(), name


def test_the_study_shows_the_tables_of_its_claims() -> None:
    study = (ROOT / "results" / "README.md").read_text()
    shown = dict(re.findall(r"<!-- table:(\w+) -->\n(.*?)<!-- /table -->", study, re.DOTALL))
    assert {"real_code", "real_vqa", "real_code_compress", "real_similarity"} <= set(shown)
    for name, text in shown.items():
        assert text == (ROOT / "results" / name / "table.md").read_text(), name
    for target in re.findall(r"\]\((?!http)([^)]+)\)", study):
        assert (ROOT / "results" / target).exists(), target


def test_the_chosen_rows_are_those_of_the_claims() -> None:
    tables = [(ROOT / "results" / claim / "table.md").read_text() for claim in ("compress_bits", "compress_sparsity")]
    rows = {
        cells[0]: cells for line in "\n".join(tables).splitlines() if len(cells := line.strip("| ").split(" | ")) > 4
    }
    shown = re.findall(
        r"^\| ((?:sparsify|quantize|svd|base_only) [^|]*) \| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE
    )
    assert len(shown) > 8
    for label, experts, less in shown:
        assert (rows[label][2], rows[label][5]) == (experts, less), label


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_library_example(dense_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    scope = {"model": dense_model(), "dense": dense_model(), "ids": torch.tensor([[1, 2, 3]])}
    example = next(block for block in BLOCKS["python"] if "ders.upcycle" in block)
    exec(example.replace("0.9999", "0.9"), scope)
    assert "step-0 certificate" in capsys.readouterr().out
    assert (tmp_path / "folder" / "config.json").exists()


def test_delta_example() -> None:
    example = next(block for block in BLOCKS["python"] if "class RowScale" in block)
    scope: dict[str, Any] = {"Delta": ders.Delta, "nn": torch.nn, "torch": torch}
    exec(example, scope)
    delta = scope["RowScale"](2, 5, 3)
    torch.nn.init.normal_(delta.scale_EX)
    x, expert = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    dense = torch.stack([delta.dense(e) for e in (0, 1)])
    torch.testing.assert_close(delta(x, expert), torch.einsum("soi,si->so", dense[expert], x))
    torch.testing.assert_close(scope["RowScale"](2, 5, 3).fit_(dense).dense(1), dense[1])
    del ders.Delta.known["RowScale"]


def test_the_headline_counts() -> None:
    from functools import partial

    from transformers import AutoModelForCausalLM, StableLmConfig

    shapes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 32}
    for delta, printed in [
        (partial(ders.SparseDelta, sparsity=0.9999), "DeRS-SM 0.26 M"),
        (partial(ders.LowRankDelta, rank=1), "DeRS-LM\n1.20 M"),
    ]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(StableLmConfig(**shapes, vocab_size=100))
        line = str(ders.upcycle(model, delta=delta))
        assert printed in README
        assert f"+{printed.split()[-2]} M parameters (vanilla +1,246 M)" in line
