"""Planned bytes are written bytes: files of every method and compression, planned on the meta device."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM

import ders
from ders.checkpoint import FolderWriter, Slot
from ders.checkpoint.header import folder_bytes
from ders.compression import compress_folder
from ders.models import planning
from ders.models.bundle import dense_from_config, save_bundle, stored_bytes
from ders.models.planning import planned_bytes, planned_compressed_bytes

DTYPES = [torch.float32, torch.bfloat16]
METHODS: dict[str, Any] = {
    "vanilla": None,
    "ders_sm": functools.partial(ders.SparseDelta, sparsity=0.9),
    "ders_lm": functools.partial(ders.LowRankDelta, rank=2),
}
COMPRESSIONS: dict[str, Any] = {
    "sparsify": functools.partial(ders.SparseDelta, sparsity=0.9, rescale=True),
    "magnitude": functools.partial(ders.SparseDelta, sparsity=0.8, selection="magnitude", values_bits=2),
    "quantize": functools.partial(ders.QuantizedDelta, bits=3),
    "sign": functools.partial(ders.QuantizedDelta, bits=1, scheme="sign", granularity="group", group_size=8),
    "svd": functools.partial(ders.LowRankDelta, rank=2),
    "base_only": ders.ZeroDelta,
}


def on_meta(like: Any, dtype: torch.dtype, **upcycling: Any) -> Any:
    model = dense_from_config(like.config).to(dtype)
    if upcycling:
        ders.upcycle(model, **upcycling)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["dense", *METHODS])
def test_a_bundle(llava_model: Any, tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    upcycling = {} if method == "dense" else {"delta": METHODS[method], "universal": True}
    plan = on_meta(llava_model.model, dtype, **upcycling)
    llava_model.model.to(dtype)
    if upcycling:
        ders.upcycle(llava_model.model, **upcycling)
    save_bundle(llava_model, tmp_path / "out")
    assert planned_bytes(plan) == stored_bytes(tmp_path / "out")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(("model_type", "extended"), [("phi", True), ("qwen2", False)])
def test_a_compressed_folder(
    dense_model: Callable[..., Any],
    tmp_path: Path,
    model_type: str,
    extended: bool,
    compression: str,
    dtype: torch.dtype,
) -> None:
    model = dense_model(model_type).to(dtype)
    model.save_pretrained(tmp_path / "parent")
    plan = on_meta(model, dtype, universal=extended)
    ders.upcycle(model, universal=extended)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(tmp_path / "moe")
    delta = COMPRESSIONS[compression]
    compress_folder(tmp_path / "moe", tmp_path / "out", base=tmp_path / "parent", delta=delta, extended=extended)
    assert planned_compressed_bytes(plan, delta=delta, extended=extended) == stored_bytes(tmp_path / "out")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tied_embeddings_are_stored_once(tmp_path: Path, dtype: torch.dtype) -> None:
    config = AutoConfig.for_model("llama", **SHAPES, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    plan = on_meta(model, dtype)
    model.save_pretrained(tmp_path)
    assert planned_bytes(plan) == stored_bytes(tmp_path)
    assert not any(slot.name == "lm_head.weight" for slots in planning.planned_files(plan).values() for slot in slots)


def test_several_files(dense_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_model()
    ders.upcycle(model)
    monkeypatch.setattr(planning, "_SHARD_SIZE", "40KB")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert planned_bytes(model) == stored_bytes(tmp_path)


def test_several_sealed_files(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(7, 3), "a": torch.zeros(5, dtype=torch.int64), "c": torch.zeros(9, dtype=torch.uint8)}
    slots = [Slot(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with FolderWriter(tmp_path, slots, shard_bytes=50) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert folder_bytes(slots, 50) == stored_bytes(tmp_path)


def test_only_full_experts_are_compressed(dense_model: Callable[..., Any]) -> None:
    model = on_meta(dense_model(), torch.float32, delta=METHODS["ders_lm"])
    with pytest.raises(ValueError, match="compression takes full experts"):
        planned_compressed_bytes(model, delta=ders.ZeroDelta)
