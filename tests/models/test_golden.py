"""Folders of format version 1, written once and kept: whatever changes, they must load and compute what they did.

`python tests/models/test_golden.py` wrote them; it refuses to write them again.
"""

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ders
from ders.checkpoint import TensorFolder
from ders.compression import compress_folder

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "v1"
FORMS: dict[str, Any] = {
    "sparsify": functools.partial(ders.SparseDelta, sparsity=0.9, rescale=True),
    "sparsify_magnitude_4_bits": functools.partial(
        ders.SparseDelta, sparsity=0.9, selection="magnitude", values_bits=4
    ),
    "sparsify_bitmap": functools.partial(ders.SparseDelta, sparsity=0.3, selection="magnitude"),
    "quantize_1_sign": functools.partial(ders.QuantizedDelta, bits=1, scheme="sign", granularity="tensor"),
    "quantize_2_row": functools.partial(ders.QuantizedDelta, bits=2),
    "quantize_3_symmetric": functools.partial(ders.QuantizedDelta, bits=3, symmetric=True),
    "quantize_4_group": functools.partial(ders.QuantizedDelta, bits=4, granularity="group", group_size=8),
    "quantize_8_tensor": functools.partial(ders.QuantizedDelta, bits=8, granularity="tensor"),
    "svd": functools.partial(ders.LowRankDelta, rank=2),
    "base_only": ders.ZeroDelta,
}
EXTENDED = ("quantize_2_row", "svd")
IDS = torch.arange(24).view(2, 12)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """In float64, so that no machine's way of summing shows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("name", ["vanilla", *FORMS])
def test_a_folder_of_version_1_computes_what_it_did(name: str) -> None:
    expected = torch.tensor(json.loads((GOLDEN / "logits.json").read_text())[name], dtype=torch.float64)
    torch.testing.assert_close(logits(GOLDEN / name)[:, -1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vanilla", *FORMS])
def test_a_folder_of_version_1_is_whole(name: str) -> None:
    section = TensorFolder(GOLDEN / name).config()["quantization_config"]
    assert section["format_version"] == 1
    assert TensorFolder(GOLDEN / name).verify() is not None


@pytest.mark.parametrize("name", FORMS)
def test_compressing_again_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    compress_folder(
        GOLDEN / "vanilla", tmp_path / "x", base=GOLDEN / "parent", delta=FORMS[name], extended=name in EXTENDED
    )
    again, before = TensorFolder(tmp_path / "x").pieces, TensorFolder(GOLDEN / name).pieces
    assert again.keys() == before.keys()
    for key, piece in before.items():
        if name == "svd" and ".deltas." in key:  # the signs of singular vectors are the library's choice
            continue
        assert torch.equal(again[key].read(), piece.read()), key


def test_an_adapter_of_version_1_computes_what_it_did() -> None:
    expected = torch.tensor(json.loads((GOLDEN / "logits.json").read_text())["adapter"], dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "parent", dtype=torch.float64)
    ders.load_adapter(model, GOLDEN / "adapter")
    torch.testing.assert_close(model(IDS).logits[:, -1], expected, rtol=1e-9, atol=1e-9)


def _write_adapter() -> torch.Tensor:
    parent = AutoModelForCausalLM.from_pretrained(GOLDEN / "parent")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "parent")
    ders.upcycle(model, delta=functools.partial(ders.LowRankDelta, rank=2))
    for name, parameter in model.named_parameters():
        if "experts" in name or "router" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    change = functools.partial(ders.QuantizedDelta, bits=4)
    parent.config._name_or_path = "parent"
    ders.save_adapter(model, GOLDEN / "adapter", parent=parent, base_change=change)
    fresh = AutoModelForCausalLM.from_pretrained(GOLDEN / "parent", dtype=torch.float64)
    ders.load_adapter(fresh, GOLDEN / "adapter")
    return fresh(IDS).logits[:, -1]


@torch.no_grad()
def _write() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    GOLDEN.mkdir(parents=True)
    model.save_pretrained(GOLDEN / "parent")
    ders.upcycle(model, universal=True, num_experts=3)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(GOLDEN / "raw")
    ders.export(GOLDEN / "raw", GOLDEN / "vanilla", layout="vanilla")
    for name, delta in FORMS.items():
        compress_folder(
            GOLDEN / "vanilla", GOLDEN / name, base=GOLDEN / "parent", delta=delta, extended=name in EXTENDED
        )
    for folder in ("vanilla", *FORMS):
        file = GOLDEN / folder / "config.json"
        data = json.loads(file.read_text())
        data["quantization_config"].pop("provenance")  # where it was made is of no interest
        file.write_text(json.dumps(data, indent=2) + "\n")
    adapter = {"adapter": _write_adapter().tolist()}
    shutil.rmtree(GOLDEN / "raw")
    last = adapter | {name: logits(GOLDEN / name)[:, -1].tolist() for name in ("vanilla", *FORMS)}
    (GOLDEN / "logits.json").write_text(json.dumps(last))


if __name__ == "__main__":
    if GOLDEN.exists():
        sys.exit(f"{GOLDEN} exists: files of a released format are never written again")
    _write()
