"""Export with proof: what it reports, and that nothing appears that was not proved."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import ders
from ders.checkpoint import ModelFolderError, Piece
from ders.compression import compress, own
from ders.compression.layouts import LAYOUTS
from ders.models import exporting
from ders.models.bundle import ModelBundle, save_bundle
from ders.moe import moe_layers

SPARSE = functools.partial(ders.SparseDelta, sparsity=0.5)
LOW_RANK = functools.partial(ders.LowRankDelta, rank=2)


def checkpoint(folder: Path, dense: Any, base: Any = None, delta: Any = SPARSE, **options: Any) -> Path:
    ders.upcycle(dense, num_experts=3, seed=5, **options)
    generator = torch.Generator().manual_seed(1)
    for layer in moe_layers(dense).values():
        for weight in layer.parameters():
            weight.data += (0.01 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
    if delta is not None:
        compress(dense, base, delta=delta)
    dense.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["vanilla", "mixtral", "qwen2_moe"])
def test_in_fp32_nothing_is_lost(layout: str, dense_model: Callable[..., Any], tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", dense_model(), dense_model(), layers="all")
    report = exporting.export(folder, tmp_path / "b", layout=layout)
    assert report.difference < 1e-5 * report.scale
    assert report.rounding < 1e-5 * report.scale
    assert f"layout {layout}" in str(report)
    assert report.num_bytes <= (tmp_path / "b" / "model.safetensors").stat().st_size
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("delta", [SPARSE, LOW_RANK])
def test_in_bf16_rounding_is_told_apart_from_the_conversion(
    delta: Any, dense_model: Callable[..., Any], tmp_path: Path
) -> None:
    dense, base = (dense_model().to(torch.bfloat16) for _ in range(2))
    folder = checkpoint(tmp_path / "a", dense, base, delta=delta, layers="all", universal=True)
    report = exporting.export(folder, tmp_path / "b", layout="qwen2_moe")
    assert report.difference < 1e-5 * report.scale
    assert report.rounding > 10 * report.difference


def test_biases_and_an_extended_ffn(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    model = dense_model("phi")
    ders.upcycle(model, num_experts=3, universal=True)
    compress(model, dense_model("phi"), delta=functools.partial(ders.QuantizedDelta, bits=4), extended=True)
    model.save_pretrained(tmp_path / "a")
    report = exporting.export(tmp_path / "a", tmp_path / "b", layout="vanilla")
    assert report.difference < 1e-5 * report.scale


def test_a_llava(llava_model: ModelBundle, tmp_path: Path) -> None:
    ders.upcycle(llava_model.model, layers="all", delta=SPARSE)
    save_bundle(llava_model, tmp_path / "a")
    report = exporting.export(tmp_path / "a", tmp_path / "b", layout="mixtral")
    assert report.difference < 1e-5 * report.scale


def test_from_a_stock_folder(tmp_path: Path) -> None:
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=3)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "a")
    report = exporting.export(tmp_path / "a", tmp_path / "b", layout="qwen2_moe")
    assert report.difference < 1e-5 * report.scale
    assert report.rounding == 0


def test_second_choices_drawn_with_noise_are_drawn_alike(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    noisy = functools.partial(ders.TopKRouter, second_choice_noise=True)
    folder = checkpoint(tmp_path / "a", dense_model(), dense_model(), router=noisy)
    before = torch.get_rng_state()
    report = exporting.export(folder, tmp_path / "b", layout="vanilla")
    assert report.difference < 1e-5 * report.scale
    assert torch.equal(torch.get_rng_state(), before)


def test_a_wrong_export_never_appears(
    dense_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "a", dense_model(), dense_model(), layers="all")
    right = LAYOUTS["mixtral"]

    def wrong(*arguments: Any) -> Any:
        planned = right(*arguments)
        planned.config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
        return planned

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("earlier")
    monkeypatch.setitem(LAYOUTS, "mixtral", wrong)
    with pytest.raises(ModelFolderError, match=r"logits \(up to .*\) differ by"):
        exporting.export(folder, tmp_path / "b", layout="mixtral", overwrite=True)
    assert (tmp_path / "b" / "config.json").read_text() == "earlier"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_a_wrong_synthesis_never_appears(
    dense_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "a", dense_model(), dense_model(), layers="all")
    right = own._synthesised

    def wrong(*arguments: Any) -> list[Piece]:
        def without_delta(piece: Piece) -> Piece:
            return Piece(piece.dtype, piece.shape, lambda: piece.read() * 1.001)

        return [without_delta(piece) for piece in right(*arguments)]

    monkeypatch.setattr(own, "_synthesised", wrong)
    with pytest.raises(ModelFolderError, match=r"synthesised with a relative error of 0\.001"):
        exporting.export(folder, tmp_path / "b", layout="mixtral")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_what_transformers_cannot_load_is_said_to_be_uncompared(
    dense_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "a", dense_model(), dense_model())
    monkeypatch.setattr(exporting, "is_moe_llava", lambda tensors: True)
    report = exporting.export(folder, tmp_path / "b", layout="vanilla")
    assert (report.difference, report.rounding) == (None, None)
    assert "not compared" in str(report)
