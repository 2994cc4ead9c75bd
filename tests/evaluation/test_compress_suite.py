import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from ders.checkpoint import TensorFolder
from ders.cli import benchmark
from ders.cli.app import UserError, composed
from ders.compression import read_source
from ders.evaluation import compress_suite
from ders.evaluation.measure import idle, measure, read_seconds, write_seconds
from ders.evaluation.synthetic import STABLELM_2_1_6B, write_pair

TINY = STABLELM_2_1_6B | {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def test_the_pair_is_what_it_says(tmp_path: Path) -> None:
    write_pair(TINY, tmp_path / "parent", tmp_path / "vanilla")
    for name in ("parent", "vanilla"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
        assert model.dtype == torch.bfloat16
    source = read_source(tmp_path / "vanilla")
    assert source.upcycling.layers == (0, 2)
    dense = TensorFolder(tmp_path / "parent").pieces
    expert = source.layers[2].experts["down_proj"][3].read().float()
    base = dense["model.layers.2.mlp.down_proj.weight"].read().float()
    cosine = torch.nn.functional.cosine_similarity(expert.flatten(), base.flatten(), dim=0)
    assert 0.9995 < cosine < 0.9999


def test_measuring_a_command() -> None:
    hungry = "x = bytearray(2 * 10**8)\nfor i in range(0, len(x), 4096): x[i] = 1\nimport time; time.sleep(0.3)"
    measured = measure(["python3", "-c", f"print(3)\n{hungry}"])
    assert measured.stdout == "3\n"
    assert 2e8 < measured.anonymous_bytes < 3e8
    assert 0.3 < measured.seconds < 30
    assert idle("json").anonymous_bytes < 1e8
    with pytest.raises(RuntimeError, match=r"exited with 1: (?s:.*)ZeroDivisionError"):
        measure(["python3", "-c", "1 / 0"])


def test_the_disk_is_really_used(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(10**7))
    assert read_seconds([tmp_path / "x"]) > 0
    assert write_seconds(tmp_path, 10**7 + 3) > 0
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_the_suite_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(compress_suite, "STABLELM_2_1_6B", TINY)
    config = composed("benchmark", [f"work={tmp_path / 'work'}", f"results={tmp_path / 'results'}", "format=json"])
    benchmark.run(config)
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record == json.loads((tmp_path / "results" / "benchmark_compress" / "record.json").read_text())
    assert (
        "| quantize bits=2: of the experts' bytes |" in (tmp_path / "results/benchmark_compress/table.md").read_text()
    )
    assert record["commit"]
    assert [row["command"] for row in record["rows"]] == ["sparsify sparsity=0.9", "quantize bits=2", "analyze"]
    assert len(record["goals"]) == 3 * 2 + 2 + 2
    for goal in record["goals"]:
        assert goal["met"] == (goal["figure"] <= goal["limit"])
    ratios = {row["command"]: row["expert_ratio"] for row in record["rows"]}
    assert ratios["quantize bits=2"] == pytest.approx(
        0.375 + 4 * 4 * (64 + 2 * 128) / (64 * 128 * 3 * 2 * 4) * 1, abs=0.03
    )
    assert list((tmp_path / "work").iterdir()) == []


def test_an_unknown_suite() -> None:
    with pytest.raises(UserError, match="compress, equivalence, zero_memory, layer, decode, train: got 'speed'"):
        benchmark.run(composed("benchmark", ["suite=speed"]))


def test_the_published_goals_come_from_a_run() -> None:
    folder = ROOT / "results" / "benchmark_compress"
    record = json.loads((folder / "record.json").read_text())
    assert benchmark.markdown(record) == (folder / "table.md").read_text()
    assert record["dirty"] is False
    assert record["models"]["shapes"] == STABLELM_2_1_6B
