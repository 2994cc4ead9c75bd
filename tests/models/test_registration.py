"""Folders: plain `from_pretrained` after `import ders`, and what it must refuse."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, LlavaForConditionalGeneration

import ders
from ders.models.bundle import ModelBundle, ModelFolderError, load_bundle, save_bundle, stored_bytes
from ders.moe import moe_layers

DELTAS: dict[str, Any] = {
    "vanilla": None,
    "ders_sm": functools.partial(ders.SparseDelta, sparsity=0.9),
    "ders_lm": functools.partial(ders.LowRankDelta, rank=2),
    "ders_neuron": functools.partial(ders.NeuronDelta, neurons=3),
    "ders_lm_by_layer": functools.partial(ders.LowRankByLayerDelta, rank=3, tilt=1.0),
    "ders_sm_rigl": functools.partial(ders.RegrownSparseDelta, sparsity=0.9),
}
IDS = torch.tensor([[1, 5, 9, 30, 2, 17]])


def trained(model: Any, delta: Any, **options: Any) -> Any:
    ders.upcycle(model, delta=delta, seed=11, **options)
    torch.manual_seed(2)
    for layer in moe_layers(model).values():
        for parameter in layer.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("model_type", ["llama", "phi", "gemma2"])
def test_round_trip(delta: str, model_type: str, dense_model: Callable[..., Any], tmp_path: Path) -> None:
    model = trained(dense_model(model_type), DELTAS[delta], top_k=1, universal=model_type == "phi")
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    # The weights are the same to the bit, below; where they lie in memory, a product's rounding may depend on.
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(IDS, **options), model.generate(IDS, **options))
    loaded.save_pretrained(tmp_path / "b")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == json.loads(
        (tmp_path / "b" / "config.json").read_text()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, dense_model: Callable[..., Any], tmp_path: Path) -> None:
    model = trained(dense_model(), DELTAS["ders_sm"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    layer = moe_layers(loaded)["model.layers.0.mlp"]
    original = moe_layers(model)["model.layers.0.mlp"]
    assert layer.router.weight.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(layer.router.weight.float(), original.router.weight)
    positions = [each.experts.deltas["up_proj"].positions(0) for each in (layer, original)]
    assert torch.equal(*positions)
    assert layer.experts.deltas["up_proj"].values_EN.dtype == dtype
    torch.testing.assert_close(loaded(input_ids=IDS).logits.float(), model(input_ids=IDS).logits, rtol=0.1, atol=0.05)


def test_a_loaded_model_is_an_ordinary_one(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    trained(dense_model(), DELTAS["ders_sm"]).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.float()  # transformers refuses casts of quantized models
    loaded.train()
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    assert moe_layers(AutoModel.from_pretrained(tmp_path))


@pytest.mark.parametrize("auto", [LlavaForConditionalGeneration, AutoModelForImageTextToText])
def test_llava(auto: Any, llava_model: ModelBundle, tmp_path: Path) -> None:
    trained(llava_model.model, DELTAS["ders_lm"])
    save_bundle(llava_model, tmp_path / "m")
    loaded = auto.from_pretrained(tmp_path / "m").eval()
    inputs = {"input_ids": torch.tensor([[1, *[4] * 4, 5, 6]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    assert torch.equal(loaded(**inputs).logits, llava_model.model(**inputs).logits)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_section(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


VALUES = "model.layers.2.mlp.experts.deltas.up_proj.values_EN"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f, lambda t: t.pop(VALUES)), f"lacks 1 tensors, among them {VALUES}"),
        (lambda f: edit(f, lambda t: t.pop(VALUES.replace("values", "seeds").replace("EN", "E"))), "lacks 1 tensors"),
        (
            lambda f: edit(f, lambda t: t.update({VALUES + "x": t[VALUES].clone()})),
            "tensors that its config.json does not",
        ),
        (lambda f: edit(f, lambda t: t.update({VALUES.replace("2", "1"): t[VALUES].clone()})), "does not describe"),
        (lambda f: edit(f, lambda t: t.update({VALUES: t[VALUES][:, 1:].clone()})), "mismatched"),
        (lambda f: edit_section(f, format_version=2), "format_version 2 is not known"),
        (lambda f: edit_section(f, delta={"name": "os.system"}), "unknown delta 'os.system'"),
        (lambda f: edit_section(f, router={"name": "Nobody"}), "unknown router 'Nobody'"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "truncated or not safetensors",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "holds no safetensors weights"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is missing or unreadable"),
    ],
)
def test_damaged_folders_are_refused(
    damage: Callable[[Path], None],
    message: str,
    dense_model: Callable[..., Any],
    tmp_path: Path,
    llava_model: ModelBundle,
) -> None:
    model = trained(dense_model(), DELTAS["ders_sm"])
    save_bundle(ModelBundle(model, llava_model.tokenizer), tmp_path / "m")
    load_bundle(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(ModelFolderError, match=message):
        load_bundle(tmp_path / "m")


def test_no_folder() -> None:
    with pytest.raises(ModelFolderError, match="no such folder"):
        load_bundle(Path("/nowhere/at/all"))


def test_saving_replaces_whole_or_not_at_all(
    llava_model: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bundle(llava_model, tmp_path / "m")
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(llava_model.processor), "save_pretrained", full_disk)
    llava_model.model.lm_head.weight.data += 1
    with pytest.raises(OSError, match="No space left"):
        save_bundle(llava_model, tmp_path / "m")
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before


def test_stored_bytes_are_the_weight_files(llava_model: ModelBundle, tmp_path: Path) -> None:
    save_bundle(llava_model, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors").values()
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert held < stored_bytes(tmp_path / "m") < held + 20_000


def test_import_needs_only_three_libraries() -> None:
    """The training stack is an extra: importing the package must not touch it."""
    blocked = [
        "lightning",
        "hydra",
        "omegaconf",
        "datasets",
        "wandb",
        "deepspeed",
        "sklearn",
        "matplotlib",
        "rich",
        "PIL",
    ]
    code = f"import sys\nsys.modules.update(dict.fromkeys({blocked}))\nimport ders\nprint(sorted(ders.__all__))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "upcycle" in result.stdout
