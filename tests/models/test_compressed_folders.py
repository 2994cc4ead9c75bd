"""Folders of compressed models through plain `from_pretrained`: what loads, what is saved again, what is refused."""

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
from transformers import AutoModel, AutoModelForCausalLM

import ders
from ders.checkpoint import FolderWriter, ModelFolderError, TensorFolder
from ders.compression import compress_folder
from ders.moe import moe_layers

FORMS: dict[str, Any] = {
    "sparsify": functools.partial(ders.SparseDelta, sparsity=0.9, rescale=True),
    "magnitude": functools.partial(ders.SparseDelta, sparsity=0.8, selection="magnitude", values_bits=2),
    "quantize": functools.partial(ders.QuantizedDelta, bits=3, granularity="group", group_size=8),
    "svd": functools.partial(ders.LowRankDelta, rank=2),
}
IDS = torch.tensor([[5, 9, 12, 33, 20]])


@pytest.fixture
def folder(dense_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    def make(form: str = "quantize", dtype: torch.dtype = torch.float32) -> Path:
        model = dense_model("llama").to(dtype)
        model.save_pretrained(tmp_path / "parent")
        ders.upcycle(model, universal=True)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        model.save_pretrained(tmp_path / "moe")
        compress_folder(tmp_path / "moe", tmp_path / "out", base=tmp_path / "parent", delta=FORMS[form], extended=True)
        return tmp_path / "out"

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_saved_again_it_is_the_same(folder: Any, tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    first = folder(form, dtype)
    model = AutoModelForCausalLM.from_pretrained(first, dtype="auto")
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path / "again")
    before, after = TensorFolder(first), TensorFolder(tmp_path / "again")
    assert before.pieces.keys() == after.pieces.keys()
    for name, piece in before.pieces.items():
        assert after.pieces[name].dtype == piece.dtype, name
        assert torch.equal(after.pieces[name].read(), piece.read()), name
    sections = [folder.config()["quantization_config"] for folder in (before, after)]
    assert sections[0]["provenance"].pop("content_sha256")  # of the files as they were written, which it names no more
    assert sections[0] == sections[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(again.generate(IDS, max_new_tokens=6, do_sample=False), tokens)


@pytest.mark.parametrize("form", ["magnitude", "quantize"])
def test_a_cast_touches_neither_codes_nor_grids(folder: Any, form: str) -> None:
    where = folder(form)
    stored = {name: piece.read() for name, piece in TensorFolder(where).pieces.items()}
    exact = ("codes_EOB", "steps_EG", "lows_EG", "codes_EB", "grids_E2", "support_EB")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        loaded = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
        cast = AutoModelForCausalLM.from_pretrained(where).to(dtype)
        for model in (loaded, cast):
            assert model(IDS).logits.dtype == dtype
            for name, tensor in model.state_dict().items():
                if name.endswith(exact):
                    assert torch.equal(tensor, stored[name]), name
                    assert tensor.dtype == stored[name].dtype


def test_the_headless_model_loads_too(folder: Any) -> None:
    where = folder()
    whole, headless = AutoModelForCausalLM.from_pretrained(where), AutoModel.from_pretrained(where)
    expected = whole.model(IDS).last_hidden_state
    assert torch.equal(headless(IDS).last_hidden_state, expected)


@pytest.mark.parametrize("form", FORMS)
def test_it_can_be_trained_after_it_was_scored(folder: Any, form: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder(form))
    with torch.inference_mode():
        model(IDS)
    model.train()(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_it_can_be_trained_on(folder: Any) -> None:
    """Codes stay, the shared base and everything else learns; checkpointing the layers changes no gradient."""
    where, gradients = folder(), []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(where).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def edited(where: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """The weights changed by another tool, which leaves no seal."""
    tensors = load_file(where / "model.safetensors")
    change(tensors)
    save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})


def configured(where: Path, **entries: Any) -> None:
    file = where / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(entries)
    file.write_text(json.dumps(config))


def flipped(where: Path, place: int) -> None:
    file = where / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


CODES = "model.layers.0.mlp.experts.deltas.up_proj.codes_EOB"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flipped(f, -1), r"model\.safetensors: damaged: its contents have sha256"),
        (lambda f: flipped(f, -3000), r"model\.safetensors: damaged: its contents have sha256"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
            r"model\.safetensors: truncated or not safetensors",
        ),
        (lambda f: edited(f, lambda t: t.pop(CODES)), r"out: lacks 1 tensors, among them .*up_proj\.codes_EOB"),
        (
            lambda f: edited(f, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight")),
            r"out: lacks 1 tensors, among them .*q_proj\.weight",
        ),
        (lambda f: edited(f, lambda t: t.pop("model.norm.weight")), r"out: lacks 1 tensors, among them .*norm\.weight"),
        (
            lambda f: edited(f, lambda t: t.update({"model.layers.0.mlp.experts.more": torch.ones(1)})),
            r"model\.safetensors: holds 1 tensors that its config.json does not describe, among them .*experts\.more",
        ),
        (
            lambda f: edited(f, lambda t: t.update({"model.layers.3.mlp.extra.weight": torch.ones(1)})),
            r"model\.safetensors: holds 1 tensors .*extra\.weight",
        ),
        (lambda f: configured(f, format_version=2), r"out: config\.json: format_version 2 is not known to this ders"),
        (lambda f: configured(f, format_version=None), r"format_version None is not known"),
        (lambda f: configured(f, top_k=7), r"top_k must be between 1 and num_experts=4: got 7"),
        (lambda f: configured(f, layers=[0, 9]), r"out: .*index"),
        (lambda f: configured(f, delta={}), r"out: 'name'"),
        (lambda f: configured(f, delta={"name": "QuantizedDelta", "bits": "two"}), r"out: .*"),
        (lambda f: configured(f, delta={"name": "Unheard"}), r"unknown delta 'Unheard'"),
        (lambda f: configured(f, surprise=1), r"its ders section is damaged: .*surprise"),
    ],
)
def test_damage_is_refused_by_name(folder: Any, damage: Callable[[Path], Any], message: str) -> None:
    where = folder()
    AutoModelForCausalLM.from_pretrained(where)
    damage(where)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(where)


def test_a_missing_shard_is_refused(folder: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder())
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    shards[1].unlink()
    with pytest.raises((OSError, ModelFolderError), match=shards[1].name):
        AutoModelForCausalLM.from_pretrained(tmp_path / "shards")


def test_shards_of_two_models_are_refused(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is whole, and together they are no model: a copy that stopped half-way, say."""
    monkeypatch.setitem(FolderWriter.__init__.__kwdefaults__, "shard_bytes", 40_000)
    where = folder()
    assert len(list(where.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.weights_EOI["up_proj"].mul_(1.01)
    model.save_pretrained(tmp_path / "moe2")
    compress_folder(
        tmp_path / "moe2", tmp_path / "out2", base=tmp_path / "parent", delta=FORMS["quantize"], extended=True
    )
    for file in (where, tmp_path / "out2"):
        AutoModelForCausalLM.from_pretrained(file)
    for file in where.glob("*.safetensors"):
        twin = tmp_path / "out2" / file.name
        if file.read_bytes() != twin.read_bytes():
            file.write_bytes(twin.read_bytes())
            break
    with pytest.raises(ModelFolderError, match="its shards are each whole, but not those of one model"):
        AutoModelForCausalLM.from_pretrained(where)


def test_other_dials_than_the_weights_were_written_with(folder: Any) -> None:
    where = folder()
    configured(where, delta={"name": "QuantizedDelta", "bits": 4, "granularity": "group", "group_size": 8})
    with pytest.raises(RuntimeError, match=r"(?i)size|shape"):
        AutoModelForCausalLM.from_pretrained(where)


def test_without_ders_the_dense_base_is_what_loads(folder: Any) -> None:
    """transformers says so in a warning; what it then computes is the dense base, not noise."""
    where = folder()
    code = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print('ders' in sys.modules, type(model.model.layers[0].mlp).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(where)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "LlamaMLP"]
    assert "ders" in done.stderr


def test_loading_takes_no_memory_for_supports(folder: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder("sparsify"))
    deltas = [d for layer in moe_layers(model).values() for d in layer.experts.deltas.values()]
    assert all(delta.columns_EN is None for delta in deltas)
    model(IDS)
    assert all(delta.columns_EN is not None for delta in deltas)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_it_loads_onto_a_gpu(folder: Any, form: str) -> None:
    where = folder(form)
    here = AutoModelForCausalLM.from_pretrained(where)
    there = AutoModelForCausalLM.from_pretrained(where, device_map="cuda")
    torch.testing.assert_close(there(IDS.cuda()).logits.cpu(), here(IDS).logits, rtol=1e-3, atol=1e-3)
