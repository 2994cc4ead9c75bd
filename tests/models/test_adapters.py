"""Adapters: small folders over a dense parent, and refused over any other."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import DELTAS, logits, tokens, trained
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, StableLmConfig

import ders
from ders.checkpoint import ModelFolderError, TensorFolder
from ders.models.adapters import load_adapter, save_adapter
from ders.models.bundle import ModelBundle
from ders.moe import moe_layers
from ders.upcycling.adapters import adapters, set_adapter

FIRST = "layers.0.mlp"


@pytest.mark.parametrize("method", DELTAS)
@pytest.mark.parametrize("model_type", ["llama", "phi"])
def test_round_trip(method: str, model_type: str, dense_model: Callable[..., Any], tmp_path: Path) -> None:
    dense = dense_model(model_type)
    plain = logits(dense)
    model = trained(dense, method)
    assert not torch.equal(logits(model), plain)
    summary = save_adapter(model, tmp_path / "a", parent=dense)
    assert summary.num_bytes == sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    assert "shared base as the parent's" in str(summary)
    assert load_adapter(dense, tmp_path / "a") == "default"
    assert torch.equal(logits(dense), logits(model))
    assert torch.equal(tokens(dense), tokens(model))
    set_adapter(dense, None)
    assert torch.equal(logits(dense), plain)
    assert any("biases_EO" in name for name in TensorFolder(tmp_path / "a").pieces) == (model_type == "phi")


@pytest.mark.parametrize("method", DELTAS)
def test_llava(method: str, llava_model: ModelBundle, tmp_path: Path) -> None:
    dense = llava_model.model.eval()
    inputs = {"input_ids": torch.tensor([[1, *[4] * 4, 5, 6]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    plain = logits(dense, **inputs)
    model = trained(dense, method)
    dense.save_pretrained(tmp_path / "dense")
    save_adapter(model, tmp_path / "a", parent=tmp_path / "dense")
    load_adapter(dense, tmp_path / "a")
    assert torch.equal(logits(dense, **inputs), logits(model, **inputs))
    set_adapter(dense, None)
    assert torch.equal(logits(dense, **inputs), plain)


def test_the_config_names_the_parent(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    dense_model().save_pretrained(tmp_path / "dense")
    save_adapter(trained(dense_model()), tmp_path / "a", parent=tmp_path / "dense")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["parent"] == {
        "id": str(tmp_path / "dense"),
        "revision": None,
        "sha256": TensorFolder(tmp_path / "dense").content_sha256(),
        "dtype": "float32",
    }
    assert config["base_change"] is None
    assert config["changed"] == []


@pytest.mark.parametrize("extended", [False, True])
def test_universal(extended: bool, dense_model: Callable[..., Any], tmp_path: Path) -> None:
    dense = dense_model("phi")
    model = trained(dense, universal=True, extended=extended)
    assert "universal FFNs" not in save_adapter(model, tmp_path / "a", parent=dense).carried
    if not extended:
        moe_layers(model)["model.layers.0.mlp"].universal.fc1.bias.data += 0.1
        summary = save_adapter(model, tmp_path / "a", parent=dense, overwrite=True)
        assert summary.carried["universal FFNs"] == 48 * 4
        assert summary.config.changed == [f"{FIRST}.universal.fc1.bias"]
        assert summary.config.base_change is None
    load_adapter(dense, tmp_path / "a")
    assert torch.equal(logits(dense), logits(model))


def test_what_else_changed_is_refused_by_name(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    dense = dense_model()
    model = trained(dense)
    model.model.layers[3].self_attn.q_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"1 tensors differ .* model\.layers\.3\.self_attn\.q_proj\.weight") as error:
        save_adapter(model, tmp_path / "a", parent=dense)
    assert "save_pretrained; or train with trainable=adapter" in str(error.value)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight"):
        save_adapter(trained(dense, trainable="paper"), tmp_path / "a", parent=dense)
    assert not (tmp_path / "a").exists()


def test_changed_base(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    dense = dense_model()
    plain = logits(dense)
    model = trained(dense)
    for name in ("gate_proj", "down_proj"):
        weight = getattr(moe_layers(model)["model.layers.2.mlp"], name).weight.data
        weight += 0.01 * torch.randn_like(weight)
    exact = save_adapter(model, tmp_path / "exact", parent=dense)
    assert exact.config.base_change == "exact"
    assert exact.carried["shared bases"] == 2 * 32 * 48 * 4
    small = save_adapter(model, tmp_path / "small", parent=dense, base_change=DELTAS["quantize"])
    assert small.config.base_change == {"name": "QuantizedDelta", "bits": 2}
    assert small.carried["shared bases"] < exact.carried["shared bases"] / 5
    load_adapter(dense, tmp_path / "exact", name="exact")
    assert torch.equal(logits(dense), logits(model))
    load_adapter(dense, tmp_path / "small", name="small")
    near = logits(dense)
    set_adapter(dense, None)
    assert torch.equal(logits(dense), plain)
    mlp = dense.model.layers[2].mlp
    set_adapter(dense, "small")
    layers = moe_layers(dense)["model.layers.2.mlp"], moe_layers(model)["model.layers.2.mlp"]
    change = layers[1].gate_proj.weight - mlp.gate_proj.weight
    rebuilt = layers[0].gate_proj.weight - mlp.gate_proj.weight
    oracle = DELTAS["quantize"](1, 48, 32).fit_(change.detach()[None]).dense(0)
    torch.testing.assert_close(rebuilt, oracle, atol=1e-6, rtol=0)
    assert layers[0].up_proj.weight is mlp.up_proj.weight
    assert (near - logits(model)).abs().max() < 0.05


def test_only_shared_bases_fit(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    dense = dense_model()
    vanilla = copy.deepcopy(dense)
    ders.upcycle(vanilla)
    with pytest.raises(ValueError, match="compress it first"):
        save_adapter(vanilla, tmp_path / "a", parent=dense)
    with pytest.raises(ValueError, match="was not upcycled"):
        save_adapter(dense, tmp_path / "a", parent=dense)
    with pytest.raises(ValueError, match="parent is a dense model"):
        save_adapter(trained(dense), tmp_path / "a", parent=vanilla)
    with pytest.raises(ModelFolderError, match="no such folder"):
        save_adapter(trained(dense), tmp_path / "a", parent=tmp_path / "nowhere")


def test_another_parent_is_refused(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    dense = dense_model()
    dense.config._name_or_path, dense.config._commit_hash = "someone/tiny", "abc123"
    save_adapter(trained(dense), tmp_path / "a", parent=dense)
    dense.lm_head.weight.data[0, 0] += 1e-3
    for wrong in (dense, dense_model("mistral"), dense_model("phi")):
        if wrong is not dense:
            wrong.model.embed_tokens.weight.data += 1
        with pytest.raises(ValueError, match=r"belongs over someone/tiny at revision abc123 \(sha256 .*load that par"):
            load_adapter(wrong, tmp_path / "a")
        assert not moe_layers(wrong)
        assert adapters(wrong) == []
    with pytest.raises(ValueError, match="is a dense model"):
        load_adapter(trained(dense), tmp_path / "a")


def test_types_of_the_parent(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    dense_model().bfloat16().save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    model = trained(dense)
    save_adapter(model, tmp_path / "a", parent=dense)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    load_adapter(wide, tmp_path / "a")
    torch.testing.assert_close(logits(wide), logits(copy.deepcopy(model).float()), rtol=0, atol=0)
    # Trained in fp32 over a bf16 parent: the same parent, whichever type it is given in.
    model = trained(dense.float())
    summaries = [save_adapter(model, tmp_path / str(i), parent=p) for i, p in enumerate([dense, tmp_path / "dense"])]
    assert summaries[0].config.parent.sha256 == summaries[1].config.parent.sha256
    load_adapter(dense, tmp_path / "1")
    assert torch.equal(logits(dense), logits(model))

    dense = dense_model()
    save_adapter(trained(dense), tmp_path / "wide", parent=dense)
    with pytest.raises(ValueError, match=r"loaded in torch\.bfloat16.*dtype=torch\.float32 or wider"):
        load_adapter(dense.bfloat16(), tmp_path / "wide")
    with pytest.raises(ValueError, match="wider type than the model: give it in the model's"):
        save_adapter(trained(dense_model().bfloat16()), tmp_path / "n", parent=dense_model())


# The FFNs of StableLM-2-1.6B; what is no part of an adapter is small.
STABLELM = StableLmConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=1,
    vocab_size=8,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("delta", "most"),
    [
        (functools.partial(ders.SparseDelta, sparsity=0.9999), 1.0e6),
        (functools.partial(ders.LowRankDelta, rank=1), 2.7e6),
    ],
)
def test_bytes_at_real_shapes(delta: Any, most: float, tmp_path: Path) -> None:
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(STABLELM, dtype=torch.bfloat16)
    for module in dense.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype)))
    model = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})  # one set of weights for both
    ders.upcycle(model, delta=delta, num_experts=4, top_k=2)
    summary = save_adapter(model, tmp_path / "a", parent=dense)
    assert summary.carried.keys() == {"routers", "deltas and biases"}
    assert summary.num_bytes <= most
    assert load_file(tmp_path / "a" / "adapter.safetensors")[f"{FIRST}.router.weight"].dtype == torch.float32
