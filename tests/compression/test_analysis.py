"""The analysis against slow oracles in fp64, and the verdict on models whose origin is known."""

import copy
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ders
from ders.checkpoint import ModelFolderError
from ders.compression.analysis import analyze_folder
from ders.moe import VanillaMoE, moe_layers

Folders = tuple[Path, Path]


@pytest.fixture
def folders(dense_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Folders]:
    """A dense model's folder and that of an MoE whose experts differ from it by `noise` times their own spread."""

    def make(
        model_type: str = "llama",
        *,
        noise: float = 0.01,
        dtype: torch.dtype = torch.float32,
        delta: Any = None,
        universal: bool = False,
        dense_dtype: torch.dtype | None = None,
    ) -> Folders:
        dense = dense_model(model_type).to(dtype)
        moe = copy.deepcopy(dense)
        ders.upcycle(moe, delta=delta, universal=universal, seed=3)
        generator = torch.Generator().manual_seed(1)
        for layer in moe_layers(moe).values():
            for parameter in layer.experts.parameters():
                spread = max(float(parameter.data.std()), 0.02)
                parameter.data += (noise * spread * torch.randn(parameter.shape, generator=generator)).to(dtype)
        dense.to(dense_dtype or dtype).save_pretrained(tmp_path / "dense")
        moe.save_pretrained(tmp_path / "moe")
        return tmp_path / "dense", tmp_path / "moe"

    return make


def set_parent(folder: Path, parent: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["provenance"] = {"parent": str(parent)}
    file.write_text(json.dumps(config))


def randomise(folder: Path) -> None:
    """Experts that have nothing in common."""
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(5)
    for name, tensor in tensors.items():
        if "weights_EOI" in name:
            tensors[name] = 0.02 * torch.randn_like(tensor)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def matrices(folders: Folders, layer: int, name: str) -> tuple[Tensor, Tensor]:
    """Base (O, I) and experts (E, O, I) in fp64, read by another road."""
    dense, moe = (load_file(folder / "model.safetensors") for folder in folders)
    (base,) = (t for n, t in dense.items() if n.endswith(f"layers.{layer}.mlp.{name}.weight"))
    (experts,) = (t for n, t in moe.items() if n.endswith(f"layers.{layer}.mlp.experts.weights_EOI.{name}"))
    return base.to(experts.dtype).double(), experts.double()


def slow_cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def slow_kurtosis(x: Tensor) -> float:
    centred = x - x.mean()
    return float(centred.pow(4).mean() / centred.pow(2).mean() ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "phi", "phi3"])
def test_numbers_against_oracle(model_type: str, dtype: torch.dtype, folders: Callable[..., Folders]) -> None:
    dense, moe = folders(model_type, dtype=dtype, noise=0.02)
    analysis = analyze_folder(moe, base=dense, spectrum="full")
    assert analysis.base.kind == "given"
    assert [layer.index for layer in analysis.layers] == [0, 2]
    for layer in analysis.layers:
        for name, found in layer.matrices.items():
            base, experts = matrices((dense, moe), layer.index, name)
            assert found.shape == tuple(base.shape)
            everyone = [base, *experts]
            for i, j in itertools.product(range(5), repeat=2):
                assert found.cosines[i][j] == pytest.approx(slow_cosine(everyone[i], everyone[j]), abs=1e-8)
            for e, expert in enumerate(experts):
                delta = expert - base
                assert found.ratios[e] == pytest.approx(float(delta.norm() / base.norm()), rel=1e-5)
                assert found.kurtoses[e] == pytest.approx(slow_kurtosis(delta), rel=1e-4)
                energies = torch.linalg.svdvals(delta).square().cumsum(0) / delta.square().sum()
                assert found.spectrum is not None
                expected = [float(energies[rank - 1]) for rank in found.spectrum.ranks]
                assert found.spectrum.captured[e] == pytest.approx(expected, rel=1e-5)
            assert found.min_base_cosine == min(found.cosines[0][1:])
            pairs = [found.cosines[i][j] for i in range(1, 5) for j in range(1, 5) if i != j]
            assert found.min_expert_cosine == pytest.approx(min(pairs), rel=1e-9)


def test_bf16_agrees_with_fp32(folders: Callable[..., Folders]) -> None:
    dense, moe = folders(noise=0.1, dense_dtype=torch.float32)
    exact = analyze_folder(moe, base=dense, spectrum="none")
    dense, moe = folders(noise=0.1, dtype=torch.bfloat16, dense_dtype=torch.float32)
    rounded = analyze_folder(moe, base=dense, spectrum="none")
    assert (exact.dtype, rounded.dtype) == ("float32", "bfloat16")
    for one, two in zip(exact.layers, rounded.layers, strict=True):
        for name, matrix in one.matrices.items():
            assert two.matrices[name].ratios == pytest.approx(matrix.ratios, rel=0.02)
            assert two.matrices[name].min_base_cosine == pytest.approx(matrix.min_base_cosine, abs=2e-4)
            assert matrix.spectrum is None


def test_upcycled_experts_are_known_as_such(folders: Callable[..., Folders]) -> None:
    dense, moe = folders(noise=0.01)
    for base in (dense, "mean"):
        verdict = analyze_folder(moe, base=base).verdict
        assert verdict.upcycled
        assert (verdict.sparsity, verdict.bits) == (0.9, 2)
        assert verdict.smallest_cosine > 0.999
        assert any("to be sure" in sentence for sentence in verdict.sentences)


def test_independent_experts_are_known_as_such(folders: Callable[..., Folders]) -> None:
    dense, moe = folders()
    randomise(moe)
    for base in (dense, "mean"):
        verdict = analyze_folder(moe, base=base, spectrum="none").verdict
        assert not verdict.upcycled
        assert verdict.sparsity is verdict.bits is None
        assert any("do not look upcycled" in sentence for sentence in verdict.sentences)
        assert any("base=DIR" in sentence for sentence in verdict.sentences) == (base != "mean")


def test_far_experts_and_outliers_call_for_care(folders: Callable[..., Folders]) -> None:
    dense, moe = folders(noise=0.2)
    verdict = analyze_folder(moe, base=dense).verdict
    assert verdict.upcycled
    assert (verdict.sparsity, verdict.bits) == (0.4, 4)

    dense, moe = folders(noise=0.001)
    tensors = load_file(moe / "model.safetensors")
    for name, tensor in tensors.items():
        if "weights_EOI" in name:
            tensor[:, :, 0] += 3e-4  # one column in 32: fifteen times the others
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    verdict = analyze_folder(moe, base=dense).verdict
    assert verdict.typical_kurtosis is not None
    assert verdict.typical_kurtosis > 6
    assert (verdict.sparsity, verdict.bits) == (0.9, 4)
    assert any("outliers" in sentence for sentence in verdict.sentences)


@pytest.mark.parametrize("spectrum", ["sketch", "full", "none"])
def test_zero_deltas(spectrum: str, folders: Callable[..., Folders]) -> None:
    dense, moe = folders(noise=0, universal=True)
    analysis = analyze_folder(moe, base=dense, spectrum=spectrum)
    plain = json.dumps(analysis.to_dict(), allow_nan=False)  # raises on NaN
    assert json.loads(plain) == json.loads(json.dumps(analysis.to_dict()))
    for layer in analysis.layers:
        for matrix in layer.matrices.values():
            assert {cosine for row in matrix.cosines for cosine in row} == {1.0}
            assert matrix.ratios == [0.0] * 4
            assert matrix.kurtoses == [None] * 4
            assert matrix.errors is not None
            assert {error for errors in matrix.errors.values() for error in errors} == {0.0}
    assert analysis.verdict.upcycled
    assert any("without loss" in sentence for sentence in analysis.verdict.sentences)


def test_base_is_the_recorded_parent_then_shared_then_mean(folders: Callable[..., Folders], tmp_path: Path) -> None:
    dense, moe = folders()
    assert analyze_folder(moe, spectrum="none").base.kind == "mean"
    set_parent(moe, dense)
    found = analyze_folder(moe, spectrum="none").base
    assert (found.kind, found.folder) == ("parent", str(dense))
    set_parent(moe, tmp_path / "gone")
    analysis = analyze_folder(moe, spectrum="none")
    assert analysis.base.kind == "mean"
    assert "for want of the dense model" in analysis.verdict.sentences[0]
    _, moe = folders(delta=functools.partial(ders.LowRankDelta, rank=2), noise=0.01)
    analysis = analyze_folder(moe)
    assert (analysis.base.kind, analysis.delta) == ("shared", "LowRankDelta")
    spectrum = analysis.layers[0].matrices["up_proj"].spectrum
    assert spectrum is not None
    assert all(captured is None or captured[1] == pytest.approx(1, abs=1e-4) for captured in spectrum.captured)
    assert analysis.verdict.bits is None
    assert any("nothing is left to compress" in sentence for sentence in analysis.verdict.sentences)


def test_an_extended_experts_delta_is_not_taken_for_an_expert(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    moe = dense_model()
    ders.upcycle(moe, delta=functools.partial(ders.SparseDelta, sparsity=0.5), universal=True, extended=True)
    assert not any(isinstance(layer, VanillaMoE) for layer in moe_layers(moe).values())
    moe.save_pretrained(tmp_path)
    matrix = analyze_folder(tmp_path, spectrum="none").layers[0].matrices["up_proj"]
    assert len(matrix.cosines) == 5
    assert len(matrix.ratios) == 4


def test_progress_ends_with_everything(folders: Callable[..., Folders]) -> None:
    dense, moe = folders()
    told: list[tuple[int, int]] = []
    analyze_folder(moe, base=dense, spectrum="none", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (2 * 3 * 4 * 32 * 48 * 4,) * 2


def test_errors_say_what_to_do(folders: Callable[..., Folders], tmp_path: Path) -> None:
    dense, moe = folders()
    with pytest.raises(ValueError, match="spectrum must be one of sketch, full, none: got 'svd'"):
        analyze_folder(moe, spectrum="svd")
    with pytest.raises(ModelFolderError, match="no such folder"):
        analyze_folder(tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match="no such folder"):
        analyze_folder(moe, base=tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match="not the dense model"):
        analyze_folder(moe, base=moe)

    tensors = load_file(moe / "model.safetensors")
    name = next(n for n in tensors if "weights_EOI" in n)
    tensors[name][1, 2, 3] = torch.nan
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"model.layers.0.mlp.*not finite"):
        analyze_folder(moe, base=dense)
