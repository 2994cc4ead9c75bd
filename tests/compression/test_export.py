"""Export: plain transformers, in a process that knows nothing of ders, computes the same logits."""

import copy
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
from transformers import AutoConfig, AutoModelForCausalLM

import ders
from ders.checkpoint import ModelFolderError
from ders.compression import compress, compress_folder, read_source
from ders.models.bundle import ModelBundle, save_bundle
from ders.models.exporting import export
from ders.moe import moe_layers

IDS = torch.randint(8, (2, 24), generator=torch.Generator().manual_seed(3))
SPARSE = functools.partial(ders.SparseDelta, sparsity=0.5)
QUANTIZED = functools.partial(ders.QuantizedDelta, bits=4)
LOSSLESS = functools.partial(ders.SparseDelta, sparsity=0.0, rescale=False)
RENORMALIZED = functools.partial(ders.TopKRouter, renormalize=True)
# In training only, for in evaluation 3 experts with room for 1.5 · 2/3 of all tokens take them all.
ROOMY = functools.partial(ders.TopKRouter, capacity_factor=0.5, eval_capacity_factor=1.5)
RAW = functools.partial(ders.TopKRouter, renormalize=False)


def trained(dense: Any, delta: Any = None, extended: bool = False, **options: Any) -> Any:
    """A vanilla MoE whose experts have drifted apart, compressed where there is a delta."""
    base = copy.deepcopy(dense)
    ders.upcycle(dense, num_experts=3, seed=5, **options)
    generator = torch.Generator().manual_seed(1)
    for layer in moe_layers(dense).values():
        for name, weight in layer.named_parameters():
            scale = 0.5 if name.startswith("router") else 0.01
            weight.data += (scale * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
    if delta is not None:
        compress(dense, base, delta=delta, extended=extended)
    return dense.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


# Parent, delta, options of the upcycling, layout.
CASES: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "vanilla llama": ("llama", None, {"layers": "all"}, "mixtral"),
    "sparse llama": ("llama", SPARSE, {"layers": "all"}, "mixtral"),
    "top-1 llama, renormalised": ("llama", None, {"layers": "all", "top_k": 1, "router": RENORMALIZED}, "mixtral"),
    "quantized mistral": ("mistral", QUANTIZED, {"layers": "all"}, "mixtral"),
    "mistral, some layers": ("mistral", None, {}, "qwen2_moe"),
    "sparse qwen2": ("qwen2", SPARSE, {}, "qwen2_moe"),
    "qwen2 with a window": ("qwen2 with a window", QUANTIZED, {"layers": [1, 2]}, "qwen2_moe"),
    "top-1 llama": ("llama", QUANTIZED, {"top_k": 1}, "qwen2_moe"),
    "raw top-2 llama": ("llama", None, {"layers": "all", "router": RAW}, "qwen2_moe"),
    "limits that nothing meets": ("llama", None, {"layers": "all", "router": ROOMY}, "mixtral"),
    "universal llama": ("llama", None, {"universal": True}, "qwen2_moe"),
    "universal llama, sparse": ("llama", SPARSE, {"universal": True}, "qwen2_moe"),
    "extended llama": ("llama", SPARSE, {"universal": True, "extended": True}, "qwen2_moe"),
    "extended phi": ("phi", QUANTIZED, {"universal": True, "extended": True}, "vanilla"),
}


def parent_of(name: str, dense_model: Callable[..., Any]) -> Any:
    model = dense_model(name.split()[0])
    if name == "mistral":
        model.config.sliding_window = 8
    if name == "qwen2 with a window":
        window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": None}
        config = AutoConfig.for_model(**model.config.to_dict() | window)
        windowed = AutoModelForCausalLM.from_config(config)
        windowed.load_state_dict(model.state_dict())
        return windowed
    return model


@pytest.fixture(scope="module")
def plain_transformers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[dict[str, Path]], dict[str, torch.Tensor]]:
    """Logits of many folders from one fresh process, in which ders cannot even be imported."""
    folder = tmp_path_factory.mktemp("plain")
    code = """
import json, sys
sys.modules["ders"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
torch.set_num_threads(1)
ids, logits = load_file("ids.safetensors")["ids"], {}
for name, folder in json.load(sys.stdin).items():
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, experts_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        logits[name] = model.eval()(input_ids=ids).logits.contiguous()
save_file(logits, "logits.safetensors")
"""

    def compute(folders: dict[str, Path]) -> dict[str, torch.Tensor]:
        save_file({"ids": IDS}, folder / "ids.safetensors")
        names = json.dumps({name: str(path) for name, path in folders.items()})
        subprocess.run([sys.executable, "-c", code], cwd=folder, input=names, text=True, check=True)
        return load_file(folder / "logits.safetensors")

    return compute


def test_plain_transformers_computes_the_same(
    plain_transformers: Any, dense_model: Callable[..., Any], llava_model: ModelBundle, tmp_path: Path
) -> None:
    expected, folders = {}, {}
    for name, (parent, delta, options, layout) in CASES.items():
        extended = options.get("extended", False)
        upcycling = {key: value for key, value in options.items() if key != "extended"}
        model = trained(parent_of(parent, dense_model), delta, extended, **upcycling)
        model.save_pretrained(tmp_path / name / "ours")
        export(tmp_path / name / "ours", tmp_path / name / "theirs", layout=layout)
        expected[name] = logits(model)
        if layout != "vanilla":
            folders[name] = tmp_path / name / "theirs"
            assert "quantization_config" not in json.loads((folders[name] / "config.json").read_text())
            assert (folders[name] / "generation_config.json").exists()
        else:
            loaded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / name / "theirs"))
            torch.testing.assert_close(loaded, expected[name], rtol=0, atol=1e-6)
    for layout in ("mixtral", "qwen2_moe"):
        name = f"llava {layout}"
        bundle = ModelBundle(trained(copy.deepcopy(llava_model.model), layers="all"), llava_model.processor)
        save_bundle(bundle, tmp_path / name / "ours")
        export(tmp_path / name / "ours", tmp_path / name / "theirs", layout=layout)
        assert (tmp_path / name / "theirs" / "processor_config.json").exists()
        expected[name], folders[name] = logits(bundle.model), tmp_path / name / "theirs"
    found = plain_transformers(folders)
    for name, folder in folders.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5 * scale, msg=f"{name}: {folder}")


@pytest.mark.parametrize("layout", ["vanilla", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("delta", [SPARSE, QUANTIZED])
def test_there_and_back(layout: str, delta: Any, dense_model: Callable[..., Any], tmp_path: Path) -> None:
    """Full experts → deltas → a layout → deltas without loss: the same logits as from the first deltas."""
    model = trained(dense_model("llama"), delta, layers="all")
    model.save_pretrained(tmp_path / "a")
    dense_model("llama").save_pretrained(tmp_path / "base")
    export(tmp_path / "a", tmp_path / "b", layout=layout)
    compress_folder(tmp_path / "b", tmp_path / "c", base=tmp_path / "base", delta=LOSSLESS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert loaded.config.model_type == "llama"
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_a_universal_ffn_comes_back(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    trained(dense_model("qwen2"), None, universal=True).save_pretrained(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", layout="qwen2_moe")
    export(tmp_path / "b", tmp_path / "c", layout="vanilla")
    a, c = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert a.keys() == c.keys()
    assert all(torch.equal(a[name], c[name]) for name in a)
    assert read_source(tmp_path / "c").upcycling.universal


def test_half_precision_is_merged_in_fp32_and_rounded_once(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    model = trained(dense_model("llama").to(torch.bfloat16), SPARSE, layers="all")
    model.save_pretrained(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", layout="mixtral")
    written = load_file(tmp_path / "b" / "model.safetensors")
    layer = moe_layers(model)["model.layers.2.mlp"]
    for name, theirs in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
        expected = getattr(layer, name).weight.float() + layer.experts.deltas[name].dense(1).float()
        found = written[f"model.layers.2.block_sparse_moe.experts.1.{theirs}.weight"]
        assert torch.equal(found, expected.bfloat16())
    gate = written["model.layers.2.block_sparse_moe.gate.weight"]
    assert torch.equal(gate, layer.router.weight.bfloat16())


def test_progress_is_in_bytes(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    trained(dense_model("llama"), SPARSE).save_pretrained(tmp_path / "a")
    seen: list[tuple[int, int]] = []
    size = export(tmp_path / "a", tmp_path / "b", layout="vanilla", progress=lambda *now: seen.append(now)).num_bytes
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (size, size)
    held = sum(tensor.nbytes for tensor in load_file(tmp_path / "b" / "model.safetensors").values())
    assert size == held


NOISY = functools.partial(ders.TopKRouter, second_choice_noise=True)
LIMITED = functools.partial(ders.TopKRouter, capacity_factor=2.0, eval_capacity_factor=1.9)
ALL = {"layers": "all"}


@pytest.mark.parametrize(
    ("parent", "entries", "options", "layout", "message"),
    [
        ("llama", {}, {}, "mixtral", "some of its layers are dense.*layout=qwen2_moe can"),
        ("llama", {}, {**ALL, "universal": True}, "mixtral", "universal FFN, and Mixtral has no.*layout=qwen2_moe can"),
        ("llama", {}, {**ALL, "top_k": 1}, "mixtral", "raw probability, and Mixtral renorm.*layout=qwen2_moe can"),
        ("qwen2", {}, ALL, "mixtral", "attention has biases, and Mixtral's has none.*layout=qwen2_moe can"),
        ("llama", {"attention_bias": True}, ALL, "qwen2_moe", "biases in all four projections.*layout=vanilla can"),
        ("llama", {"mlp_bias": True}, ALL, "mixtral", "its FFNs have biases.*layout=vanilla can"),
        (
            "stablelm",
            {},
            ALL,
            "qwen2_moe",
            "neither Mixtral nor Qwen2-MoE has the layers of stablelm.*layout=vanilla can",
        ),
        ("phi", {}, ALL, "mixtral", "neither Mixtral nor Qwen2-MoE has the layers of phi.*layout=vanilla can"),
        ("llama", {}, {**ALL, "router": NOISY}, "mixtral", "draws second choices with noise.*layout=vanilla can"),
        ("llama", {}, {**ALL, "router": LIMITED}, "qwen2_moe", "drops choices over capacity.*layout=vanilla can"),
        ("llama", {}, ALL, "gguf", "layout must be one of vanilla, mixtral, qwen2_moe: got 'gguf'"),
    ],
)
def test_what_a_layout_cannot_express(
    parent: str,
    entries: dict[str, Any],
    options: dict[str, Any],
    layout: str,
    message: str,
    dense_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    config = AutoConfig.for_model(**dense_model(parent).config.to_dict() | entries)
    model = AutoModelForCausalLM.from_config(config)
    ders.upcycle(model, **options)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ModelFolderError, match=message):
        export(tmp_path / "a", tmp_path / "b", layout=layout)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_another_router_has_no_stock_form(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    model = dense_model("llama")
    ders.upcycle(model, layers="all")
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["router"] = {"name": "SomeRouter"}
    file.write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match=r"its router is SomeRouter.*layout=vanilla can"):
        export(tmp_path / "a", tmp_path / "b", layout="qwen2_moe")


def test_an_output_is_replaced_only_on_request(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    trained(dense_model("llama"), SPARSE).save_pretrained(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", layout="vanilla")
    with pytest.raises(ModelFolderError, match="exists already"):
        export(tmp_path / "a", tmp_path / "b", layout="qwen2_moe")
    export(tmp_path / "a", tmp_path / "b", layout="qwen2_moe", overwrite=True)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "qwen2_moe"
