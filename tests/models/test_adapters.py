"""Adapters: small folders over a dense parent, refused over any other, switched in memory."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, StableLmConfig

import ders
from ders.checkpoint import FolderWriter, ModelFolderError, Slot, TensorFolder
from ders.compression import compress
from ders.models.adapters import load_adapter, save_adapter
from ders.models.bundle import ModelBundle
from ders.moe import moe_layers
from ders.upcycling.adapters import adapters, remove_adapter, set_adapter

DELTAS: dict[str, Any] = {
    "ders_sm": functools.partial(ders.SparseDelta, sparsity=0.9),
    "ders_lm": functools.partial(ders.LowRankDelta, rank=2),
    "quantize": functools.partial(ders.QuantizedDelta, bits=2),
}
IDS = torch.tensor([[1, 5, 9, 30, 2, 17]])
FIRST = "layers.0.mlp"


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS})).logits


def tokens(model: Any) -> Tensor:
    return model.generate(IDS, max_new_tokens=6, do_sample=False)


def trained(dense: Any, method: str = "ders_sm", trainable: str = "adapter", seed: int = 0, **options: Any) -> Any:
    """A copy of a dense model, upcycled (and compressed), then trained for two steps."""
    model = copy.deepcopy(dense)
    torch.manual_seed(seed)
    if method == "quantize":
        ders.upcycle(model, seed=seed, **options)
        for layer in moe_layers(model).values():
            for weight in layer.experts.weights_EOI.values():
                weight.data += 0.002 * torch.randn_like(weight)
        compress(model, dense, delta=DELTAS[method])
    else:
        ders.upcycle(model, delta=DELTAS[method], seed=seed, **options)
    ders.set_trainable(model, trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        ids = torch.randint(5, 20, (2, 8))
        text = model.model.language_model if hasattr(model.model, "vision_tower") else model.model
        head = model.lm_head(text(input_ids=ids).last_hidden_state)
        nn.functional.cross_entropy(head.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


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
    dense = dense_model().bfloat16()
    dense.save_pretrained(tmp_path / "dense")
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


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change an adapter's tensors and seal it again."""
    file = folder / "adapter.safetensors"
    tensors = load_file(file)
    change(tensors)
    with FolderWriter(folder, [Slot(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()
    (folder / "model.safetensors").rename(file)


def flip(folder: Path) -> None:
    file = folder / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_section(folder: Path, **changes: Any) -> None:
    section = json.loads((folder / "adapter_config.json").read_text())["upcycling"]
    edit(folder, upcycling=section | changes)


VALUES = f"{FIRST}.experts.deltas.up_proj.values_EN"
WEIGHTS = r"a/adapter\.safetensors: "
CONFIG = r"a/adapter_config\.json: "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, WEIGHTS + "damaged"),
        (
            lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:-9]),
            WEIGHTS + "truncated",
        ),
        (lambda f: (f / "adapter.safetensors").unlink(), WEIGHTS),
        (lambda f: save_file(load_file(f / "adapter.safetensors"), f / "adapter.safetensors"), WEIGHTS + "bears no"),
        (lambda f: rewrite(f, lambda t: t.pop(VALUES)), f"{WEIGHTS}lacks {VALUES}"),
        (lambda f: rewrite(f, lambda t: t.update({VALUES + "x": t[VALUES]})), f"{WEIGHTS}holds 1 .*{VALUES}x"),
        (lambda f: rewrite(f, lambda t: t.update({"other": t[VALUES]})), f"{WEIGHTS}holds 1 .* other"),
        (lambda f: rewrite(f, lambda t: t.update({VALUES: t[VALUES][1:]})), f"{WEIGHTS}{FIRST} is not what"),
        (lambda f: edit(f, changed=[f"{FIRST}.up_proj.weight"]), f"{WEIGHTS}lacks {FIRST}.up_proj.weight"),
        (lambda f: edit(f, changed=["elsewhere"]), f"{WEIGHTS}holds 1 .* elsewhere"),
        (lambda f: edit(f, format_version=2), CONFIG + "format_version 2 is not known"),
        (lambda f: edit(f, more=1), CONFIG + "damaged"),
        (lambda f: edit(f, parent={"id": "x"}), CONFIG + "damaged"),
        (lambda f: edit_section(f, delta={"name": "os.system"}), CONFIG + "unknown delta"),
        (lambda f: edit_section(f, delta=None), CONFIG + "the experts of this model are full"),
        (lambda f: edit_section(f, layers=[0, 99]), CONFIG + r"layers \[99\] are not among the 4"),
        (lambda f: (f / "adapter_config.json").write_text("{"), CONFIG + "unreadable"),
        (lambda f: (f / "adapter_config.json").unlink(), CONFIG + "no such file"),
    ],
)
def test_damaged_adapters_are_refused(
    damage: Callable[[Path], Any], message: str, dense_model: Callable[..., Any], tmp_path: Path
) -> None:
    dense = dense_model()
    plain = logits(dense)
    save_adapter(trained(dense), tmp_path / "a", parent=dense)
    damage(tmp_path / "a")
    with pytest.raises(ModelFolderError, match=message):
        load_adapter(dense, tmp_path / "a")
    assert adapters(dense) == []
    assert torch.equal(logits(dense), plain)


@pytest.fixture
def two(dense_model: Callable[..., Any], tmp_path: Path) -> tuple[Any, dict[str | None, Any]]:
    """A parent with two adapters over other layers, and the whole models they were saved from."""
    dense = dense_model("phi")
    models = {None: copy.deepcopy(dense), "sm": trained(dense), "lm": trained(dense, "ders_lm", seed=1, layers=[2, 3])}
    for name in ("sm", "lm"):
        save_adapter(models[name], tmp_path / name, parent=models[None])
        load_adapter(dense, tmp_path / name, name=name)  # the second while the first is active
    return dense, models


def test_switching(two: tuple[Any, dict[str | None, Any]], tmp_path: Path) -> None:
    dense, models = two
    assert adapters(dense) == ["sm", "lm"]
    expected = {name: (logits(model), tokens(model)) for name, model in models.items()}
    names = set(dense.state_dict())
    for i, name in enumerate(["sm", "lm", None, "lm", "sm", None]):
        set_adapter(dense, name)
        assert torch.equal(logits(dense), expected[name][0])
        assert torch.equal(tokens(dense), expected[name][1])
        # What is not active is in no state_dict, no optimizer and no folder.
        names = set(models[name].state_dict())
        assert set(dense.state_dict()) == names
        assert len(list(dense.parameters())) == len(list(models[name].parameters()))
        dense.save_pretrained(tmp_path / f"whole{i}")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"whole{i}").eval()
        assert torch.equal(logits(loaded), expected[name][0])
        assert hasattr(loaded.config, "quantization_config") == (name is not None)
    with pytest.raises(ValueError, match="no adapter 'ml' over this model; it has sm, lm"):
        set_adapter(dense, "ml")
    with pytest.raises(ValueError, match="has an adapter 'sm' already"):
        load_adapter(dense, tmp_path / "sm", name="sm")


def test_base_tensors_are_shared(two: tuple[Any, dict[str | None, Any]]) -> None:
    dense, _ = two
    places = set()
    for name in ("sm", "lm", None):
        set_adapter(dense, name)
        places.add(tuple(dense.model.layers[2].mlp.get_submodule(p).weight.data_ptr() for p in ("fc1", "fc2")))
    assert len(places) == 1
    assert not hasattr(dense.config, "quantization_config")


def test_adapters_follow_a_cast(two: tuple[Any, dict[str | None, Any]]) -> None:
    dense, models = two
    set_adapter(dense, "sm")
    dense.to(torch.float64)
    for name in ("lm", None, "sm"):
        set_adapter(dense, name)
        assert {p.dtype for p in dense.parameters()} == {torch.float64}
        torch.testing.assert_close(logits(dense), logits(models[name].double()), rtol=0, atol=0)
    dense.to(torch.bfloat16).train()
    set_adapter(dense, "lm")
    layer = moe_layers(dense)["model.layers.2.mlp"]
    assert layer.router.weight.dtype == torch.float32
    assert layer.experts.deltas["fc1"].a_ERI.dtype == torch.bfloat16
    assert layer.training
    assert logits(dense).isfinite().all()


def test_removing(two: tuple[Any, dict[str | None, Any]], tmp_path: Path) -> None:
    dense, models = two
    remove_adapter(dense, "sm")
    assert torch.equal(logits(dense), logits(models["lm"]))
    remove_adapter(dense, "lm")
    assert torch.equal(logits(dense), logits(models[None]))
    assert adapters(dense) == []
    with pytest.raises(ValueError, match="no adapter 'lm' over this model"):
        remove_adapter(dense, "lm")
    with pytest.raises(ValueError, match="load one with load_adapter"):
        set_adapter(dense, "lm")
    load_adapter(dense, tmp_path / "sm")
    assert torch.equal(logits(dense), logits(models["sm"]))


def test_copies_and_further_training(two: tuple[Any, dict[str | None, Any]], tmp_path: Path) -> None:
    original, models = two
    dense = copy.deepcopy(original)
    set_adapter(dense, "sm")
    moe_layers(dense)["model.layers.0.mlp"].router.weight.data += 0.1
    save_adapter(dense, tmp_path / "more", parent=dense)
    load_adapter(original, tmp_path / "more", name="more")
    assert torch.equal(logits(original), logits(dense))
    set_adapter(original, "sm")
    assert torch.equal(logits(original), logits(models["sm"]))
    # Training that reached the shared tensors changed the parent itself: no adapter over it could be loaded again.
    dense.lm_head.weight.data += 0.1
    with pytest.raises(ValueError, match="trained or cast since its adapters were loaded"):
        save_adapter(dense, tmp_path / "lost", parent=dense)


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
    print(summary)
    assert summary.carried.keys() == {"routers", "deltas and biases"}
    assert 0.9 * most > summary.num_bytes if most == 1e6 else summary.num_bytes <= most
    assert load_file(tmp_path / "a" / "adapter.safetensors")[f"{FIRST}.router.weight"].dtype == torch.float32
