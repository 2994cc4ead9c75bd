"""Compression in memory, from disk to disk, and loaded again: one and the same model, to the bit."""

import copy
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import ders
from ders.checkpoint import ModelFolderError, TensorFolder
from ders.compression import compress, compress_folder, read_source
from ders.models.bundle import ModelBundle, weights_sha256
from ders.models.tiny import TinyLlava
from ders.moe import SharedBaseMoE, moe_layers

FORMS: dict[str, Callable[..., Any]] = {
    "sparsify": functools.partial(ders.SparseDelta, sparsity=0.9, rescale=True),
    "magnitude": functools.partial(ders.SparseDelta, sparsity=0.8, selection="magnitude", values_bits=4),
    "quantize": functools.partial(ders.QuantizedDelta, bits=2),
    "sign": functools.partial(ders.QuantizedDelta, bits=1, scheme="sign", granularity="tensor"),
    "svd": functools.partial(ders.LowRankDelta, rank=3),
    "by_layer": functools.partial(ders.LowRankByLayerDelta, rank=3, tilt=1.0),
    "neurons": functools.partial(ders.NeuronDelta, neurons=5),
    "base_only": ders.ZeroDelta,
}
EXACT = functools.partial(ders.SparseDelta, sparsity=0.0)


def trained(dense: Any, *, universal: bool = False, scale: float = 0.01, **options: Any) -> Any:
    model = copy.deepcopy(dense)
    ders.upcycle(model, universal=universal, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


@pytest.fixture
def pair(dense_model: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """A dense model and a trained vanilla MoE of it, both also in folders `parent` and `moe`."""

    def make(model_type: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
        dense = dense_model(model_type).to(dtype)
        model = trained(dense, **options)
        dense.save_pretrained(tmp_path / "parent")
        model.save_pretrained(tmp_path / "moe")
        # As loaded: a cast by hand would also round the buffers of the rotary embedding.
        return tuple(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("parent", "moe"))

    return make


@pytest.mark.parametrize("base", ["parent", "mean"])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("model_type", "dtype"), [("llama", torch.bfloat16), ("phi", torch.float32)])
@pytest.mark.filterwarnings("ignore:base=mean")
def test_memory_disk_and_loaded_agree_to_the_bit(
    pair: Any, tmp_path: Path, model_type: str, dtype: torch.dtype, form: str, extended: bool, base: str
) -> None:
    dense, model = pair(model_type, dtype, universal=True)
    where = tmp_path / "parent" if base == "parent" else "mean"
    on_disk = compress_folder(tmp_path / "moe", tmp_path / "out", base=where, delta=FORMS[form], extended=extended)
    in_memory = compress(model, dense if base == "parent" else "mean", delta=FORMS[form], extended=extended)
    assert on_disk == in_memory
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, loaded(ids).logits, rtol=1e-5, atol=1e-6)
    assert ("universal" in {name.split(".")[4] for name in found if ".mlp." in name}) == (not extended)


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "phi", "phi3"])
def test_keeping_everything_loses_nothing(pair: Any, model_type: str, extended: bool) -> None:
    """A delta of sparsity 0 is the whole difference: the compressed model is the vanilla one."""
    dense, model = pair(model_type, torch.float64, universal=True)
    ids = torch.randint(3, 60, (2, 9))
    before = model(ids).logits
    compress(model, dense, delta=EXACT, extended=extended)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-10, atol=1e-10)


def test_base_only_is_the_dense_ffn(pair: Any) -> None:
    dense, model = pair()
    compress(model, dense, delta=ders.ZeroDelta)
    for index, layer in enumerate(moe_layers(model).values()):
        own = dense.model.layers[2 * index].mlp
        x = torch.randn(1, 5, 32)
        torch.testing.assert_close(layer(x), own(x), rtol=1e-5, atol=1e-6)


def test_the_mean_is_the_mean(pair: Any) -> None:
    _, model = pair()
    experts = next(iter(moe_layers(model).values())).experts.weights_EOI["up_proj"].detach().clone()
    with pytest.warns(UserWarning, match="base=mean: deltas are taken from the mean of each layer's experts"):
        compress(model, "mean", delta=ders.ZeroDelta)
    torch.testing.assert_close(next(iter(moe_layers(model).values())).up_proj.weight, experts.mean(0))


def test_what_training_changed_elsewhere_is_kept(pair: Any, tmp_path: Path) -> None:
    """The paper's third stage also trains dense FFNs: only the MoE layers' experts are compressed."""
    _, model = pair()
    compress_folder(tmp_path / "moe", tmp_path / "out", base=tmp_path / "parent", delta=FORMS["quantize"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    own, found = model.state_dict(), loaded.state_dict()
    kept = [name for name in found if name in own]
    assert any("layers.1.mlp" in name for name in kept)
    assert any("layers.0.mlp.router" in name for name in kept)
    assert all(torch.equal(own[name], found[name]) for name in kept)


def test_a_llava(llava_model: ModelBundle, tmp_path: Path) -> None:
    dense = llava_model.model
    model = trained(dense)
    dense.save_pretrained(tmp_path / "parent")
    model.save_pretrained(tmp_path / "moe")
    compress_folder(tmp_path / "moe", tmp_path / "out", base=tmp_path / "parent", delta=FORMS["quantize"])
    compress(model, dense, delta=FORMS["quantize"])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("form", [form for form in FORMS if form != "base_only"])
def test_counted_bits_are_the_bytes_in_the_file(pair: Any, tmp_path: Path, form: str) -> None:
    pair(universal=True)
    summary = compress_folder(tmp_path / "moe", tmp_path / "out", base=tmp_path / "parent", delta=FORMS[form])
    folder = TensorFolder(tmp_path / "out")
    deltas = sum(piece.num_bytes for name, piece in folder.pieces.items() if ".experts." in name)
    bases = sum(
        piece.num_bytes
        for name, piece in folder.pieces.items()
        if ".mlp." in name and name.split(".")[2] in "02" and name.endswith("_proj.weight") and "universal" not in name
    )
    assert (summary.delta_bytes, summary.base_bytes) == (deltas, bases)
    file = tmp_path / "out" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == header + sum(piece.num_bytes for piece in folder.pieces.values())


def test_the_paper_s_arithmetic(pair: Any) -> None:
    """Experts of 16 bits: 1 + E(1 − p) and 1 + E·k/16 copies instead of E, but for seeds, grids and rounding."""
    dense, model = pair("llama", torch.bfloat16)
    for delta, copies in [(FORMS["sparsify"], 1 + 4 * 0.1), (FORMS["quantize"], 1 + 4 * 2 / 16)]:
        summary = compress(copy.deepcopy(model), dense, delta=delta)
        extra = 8 * 4 * 6 if delta is FORMS["sparsify"] else 4 * 4 * 2 * (48 + 48 + 32)  # seeds; grids of every row
        assert summary.base_bytes + summary.delta_bytes == pytest.approx(
            summary.expert_bytes * copies / 4 + extra, abs=64
        )


def test_the_parent_is_recorded_and_checked(pair: Any, tmp_path: Path, dense_model: Callable[..., Any]) -> None:
    pair()
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    sha256 = weights_sha256(tmp_path / "parent")
    config["quantization_config"]["provenance"] = {"parent": "somewhere", "parent_sha256": sha256}
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    compress_folder(tmp_path / "moe", tmp_path / "out", base=tmp_path / "parent", delta=FORMS["svd"])
    provenance = read_source(tmp_path / "out").provenance
    assert provenance["parent_sha256"] == sha256
    assert provenance["content_sha256"] == weights_sha256(tmp_path / "out")
    other = dense_model()
    with torch.no_grad():
        other.model.embed_tokens.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelFolderError, match=r"other: not the parent of .*moe.* \(somewhere\)"):
        compress_folder(tmp_path / "moe", tmp_path / "out2", base=tmp_path / "other", delta=FORMS["svd"])
    assert not (tmp_path / "out2").exists()


def test_a_base_that_explains_nothing(pair: Any, tmp_path: Path, dense_model: Callable[..., Any]) -> None:
    _, model = pair()
    other = dense_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.02)
    with pytest.raises(ValueError, match=r"layer 0 gate_proj, expert 0: differs from the base by \d"):
        compress(model, other, delta=FORMS["svd"])
    assert not any(isinstance(layer, SharedBaseMoE) for layer in moe_layers(model).values())
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="it did not come from this base"):
        compress_folder(tmp_path / "moe", tmp_path / "out", base=tmp_path / "other", delta=FORMS["svd"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["moe", "other", "parent"]


@pytest.mark.parametrize("base", ["parent", "mean"])
@pytest.mark.filterwarnings("ignore:base=mean")
def test_weights_that_are_not_finite_are_found_in_every_expert(pair: Any, base: str) -> None:
    dense, model = pair()
    with torch.no_grad():
        next(iter(moe_layers(model).values())).experts.weights_EOI["up_proj"][2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layer 0 up_proj, expert \d: holds weights that are not finite"):
        compress(model, dense if base == "parent" else "mean", delta=FORMS["svd"])


def test_experts_that_share_nothing_are_warned_of(pair: Any) -> None:
    _, model = pair(scale=1.0)
    with warnings.catch_warnings(record=True) as caught:
        compress(model, "mean", delta=FORMS["svd"])
    assert any("they have little in common" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m, d: compress(d, d, delta=FORMS["svd"]), "has no MoE layers"),
        (lambda m, d: compress(m, d, delta=FORMS["svd"], extended=True), "needs a universal FFN"),
        (lambda m, d: compress(m, "median", delta=FORMS["svd"]), "base must be the dense model or"),
        (lambda m, d: compress(m, m, delta=FORMS["svd"]), "base is not the dense model"),
        (lambda m, d: (compress(m, d, delta=FORMS["svd"]), compress(m, d, delta=FORMS["svd"])), "over a shared base"),
    ],
)
def test_refusals(pair: Any, act: Callable[[Any, Any], Any], message: str) -> None:
    dense, model = pair()
    with pytest.raises(ValueError, match=message):
        act(model, dense)


def test_folders_that_cannot_be_compressed(pair: Any, tmp_path: Path) -> None:
    pair()
    with pytest.raises(ModelFolderError, match=r"holds no MoE of a known layout \(ders, mixtral"):
        compress_folder(tmp_path / "parent", tmp_path / "out", base="mean", delta=FORMS["svd"])
    (tmp_path / "moe" / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match=r"config\.json: missing or unreadable"):
        compress_folder(tmp_path / "moe", tmp_path / "out", base="mean", delta=FORMS["svd"])


def test_a_base_of_another_width_or_without_layers(pair: Any, tmp_path: Path, dense_model: Any) -> None:
    pair()
    small = dense_model("llama")
    small.model.layers = small.model.layers[:1]
    small.config.num_hidden_layers = 1
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ModelFolderError, match="small: not the dense model these experts came from"):
        compress_folder(tmp_path / "moe", tmp_path / "out", base=tmp_path / "small", delta=FORMS["svd"])


def test_a_damaged_source_is_refused(pair: Any, tmp_path: Path) -> None:
    pair()
    ders.export(tmp_path / "moe", tmp_path / "sealed", layout="vanilla")
    file = tmp_path / "sealed" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelFolderError, match=r"model\.safetensors: damaged"):
        compress_folder(tmp_path / "sealed", tmp_path / "out", base="mean", delta=FORMS["svd"])


@pytest.mark.parametrize("output", ["moe", "parent", "moe/inside", "."])
def test_what_is_read_is_never_written(pair: Any, tmp_path: Path, output: str) -> None:
    pair()
    with pytest.raises(ModelFolderError, match="which is read here, or inside it, or around it"):
        compress_folder(
            tmp_path / "moe", tmp_path / output, base=tmp_path / "parent", delta=FORMS["svd"], overwrite=True
        )


def test_other_files_come_along_but_no_pickles(pair: Any, tmp_path: Path) -> None:
    pair()
    for name in ("tokenizer.json", "LICENSE", "optimizer.pt", "pytorch_model.bin", ".hidden"):
        (tmp_path / "moe" / name).write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compress_folder(tmp_path / "moe", tmp_path / "out", base="mean", delta=FORMS["svd"])
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "LICENSE", "config.json", "generation_config.json", "model.safetensors"}


def test_progress_is_told_in_bytes(pair: Any, tmp_path: Path) -> None:
    pair()
    told: list[tuple[int, int]] = []
    compress_folder(
        tmp_path / "moe",
        tmp_path / "out",
        base=tmp_path / "parent",
        delta=FORMS["svd"],
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len({total for _, total in told}) == 1


def test_a_vision_tower_with_the_same_names_and_shapes(tmp_path: Path) -> None:
    """Phi's FFN and CLIP's are both `mlp.fc1`, `mlp.fc2`: only the decoder's is meant."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    recipe = TinyLlava(
        text={"model_type": "phi", **sizes, "num_key_value_heads": 4, "max_position_embeddings": 64},
        vision={"image_size": 16, "patch_size": 8, **sizes},
        feature_layer=-1,
    )
    torch.manual_seed(0)
    dense = recipe.dense()
    model = trained(dense)
    dense.save_pretrained(tmp_path / "parent")
    model.save_pretrained(tmp_path / "moe")
    compress_folder(tmp_path / "moe", tmp_path / "out", base=tmp_path / "parent", delta=FORMS["quantize"])
    compress(model, dense, delta=FORMS["quantize"])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    pairs = zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    again = read_source(tmp_path / "out").layers[2]
    assert torch.equal(again.base["fc1"].read(), dense.model.language_model.layers[2].mlp.fc1.weight)
    ders.export(tmp_path / "out", tmp_path / "full", layout="vanilla")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_experts": 3}, r"moe: config.json says num_experts=3, and .*gate_proj holds 4"),
        ({"layers": []}, "names no MoE layers"),
        ({"layers": [0, 1, 2]}, r"incomplete: no experts of layers \[1\]"),
        ({"top_k": 9}, "top_k must be between 1 and num_experts=4"),
        ({"format_version": 3}, "format_version 3 is not known"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights(
    pair: Any, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    pair()
    file = tmp_path / "moe" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(entries)
    file.write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match=message):
        compress_folder(tmp_path / "moe", tmp_path / "out", base=tmp_path / "parent", delta=FORMS["svd"])
    assert not (tmp_path / "out").exists()
