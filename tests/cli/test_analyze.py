import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ders
from ders.cli.analyze import main, output_folder
from ders.cli.app import ROOT, UserError
from ders.moe import moe_layers


@pytest.fixture
def checkpoint(dense_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A trained MoE of the phi family, beside its dense parent."""
    model = dense_model("phi")
    model.save_pretrained(tmp_path / "dense")
    ders.upcycle(model, top_k=1)
    torch.manual_seed(0)
    for layer in moe_layers(model).values():
        for weights_EOI in layer.experts.weights_EOI.values():
            weights_EOI.data += 1e-4 * torch.randn_like(weights_EOI)
    model.save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


@pytest.fixture
def analyze(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def start(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["analyze.py", *arguments])
        main()

    return start


def test_table_verdict_and_files(checkpoint: Path, analyze: Callable[..., None], tmp_path: Path, capsys: Any) -> None:
    before = sorted(checkpoint.iterdir())
    output = tmp_path / "out"
    analyze(f"checkpoint={checkpoint}", f"base={tmp_path / 'dense'}", f"output={output}")
    assert sorted(checkpoint.iterdir()) == before
    assert {file.name for file in output.iterdir()} == {"analysis.json", "similarity.png", "deltas.png"}
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines() if "fc" in line]
    assert [row[:2] for row in rows] == [["0", "fc1"], ["0", "fc2"], ["2", "fc1"], ["2", "fc2"]]
    found = json.loads((output / "analysis.json").read_text())
    fc1 = found["layers"][0]["matrices"]["fc1"]
    assert rows[0][2] == f"{min(fc1['cosines'][0]):.6f}"
    assert rows[0][4] == f"{max(fc1['ratios']):.4f}"
    assert "A sparsity of 0.9 or 2 bits look safe" in out
    assert all(sentence in out for sentence in found["verdict"]["sentences"])
    assert "analysing: 100 %" in err


def test_json_is_one_line(checkpoint: Path, analyze: Callable[..., None], tmp_path: Path, capsys: Any) -> None:
    analyze(f"checkpoint={checkpoint}", "base=mean", f"output={tmp_path / 'out'}", "format=json", "spectrum=none")
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["verdict"]["upcycled"] is True
    assert found["base"]["kind"] == "mean"
    assert found == json.loads((tmp_path / "out" / "analysis.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=nowhere"], "nowhere: no such folder. Give the path"),
        ([], "checkpoint"),
        (["checkpoint={moe}", "base=nowhere"], "nowhere: no such folder"),
        (["checkpoint={moe}", "spectrum=svd"], "spectrum must be one of sketch, full, none"),
        (["checkpoint={moe}", "format=xml"], "format must be table or json"),
        (["checkpoint={moe}", "output={moe}/figures"], "inside the model folder"),
        (["checkpoint={moe}/../dense"], "no MoE of a known layout"),
    ],
)
def test_errors(arguments: list[str], message: str, checkpoint: Path, analyze: Callable[..., None]) -> None:
    with pytest.raises(SystemExit) as stopped:
        analyze(*(argument.format(moe=checkpoint) for argument in arguments))
    assert str(stopped.value).startswith("error: ")  # a text as exit code: printed, and the status is 1
    assert message in str(stopped.value)


def test_where_results_go(tmp_path: Path) -> None:
    assert output_folder(None, tmp_path / "mixtral") == ROOT / "outputs" / "analysis" / "mixtral"
    assert output_folder(None, tmp_path / "vanilla-0123" / "model").name == "vanilla-0123"
    assert output_folder("here", tmp_path) == Path("here")
    with pytest.raises(UserError, match="choose another"):
        output_folder(str(tmp_path), tmp_path)
