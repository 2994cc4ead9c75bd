"""MoE folders that others wrote, read back: the same logits from our own layout."""

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import ders
from ders.checkpoint import ModelFolderError
from ders.compression import compress_folder, read_source
from ders.models.exporting import export
from ders.moe import moe_layers

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
IDS = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(3))


def randomized(model: Any) -> Any:
    """Random weights large enough that a wrong epsilon, gate or rotary base shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        drawn = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + drawn if name.endswith("norm.weight") else drawn)
    return model.eval()


def mixtral(**entries: Any) -> Any:
    config = MixtralConfig(**SMALL | {"intermediate_size": 48, "num_local_experts": 4} | entries)
    return randomized(MixtralForCausalLM(config))


def qwen2_moe(shared: str = "neutral", **entries: Any) -> Any:
    sizes = {"intermediate_size": 48, "moe_intermediate_size": 48, "num_experts": 4}
    width = 48 if shared == "universal" else 8
    config = Qwen2MoeConfig(**SMALL | sizes | {"shared_expert_intermediate_size": width} | entries)
    model = randomized(Qwen2MoeForCausalLM(config))
    for layer in model.model.layers:
        if hasattr(layer.mlp, "shared_expert"):
            if shared == "neutral":
                layer.mlp.shared_expert.down_proj.weight.data.zero_()
            if shared != "learned":
                layer.mlp.shared_expert_gate.weight.data.zero_()
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    model.eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model(input_ids=IDS).logits


def as_vanilla(folder: Path, output: Path) -> Any:
    export(folder, output, layout="vanilla")
    return AutoModelForCausalLM.from_pretrained(output)


STOCK: dict[str, tuple[Callable[[], Any], str]] = {
    "mixtral": (mixtral, "llama"),
    "mixtral top-1": (functools.partial(mixtral, num_experts_per_tok=1), "llama"),
    "mixtral with a window": (functools.partial(mixtral, sliding_window=8), "mistral"),
    "mixtral, tied": (functools.partial(mixtral, tie_word_embeddings=True, rms_norm_eps=1e-3), "llama"),
    "qwen2_moe": (functools.partial(qwen2_moe, norm_topk_prob=True), "qwen2"),
    "qwen2_moe, raw gates": (qwen2_moe, "qwen2"),
    "qwen2_moe, raw top-1": (functools.partial(qwen2_moe, num_experts_per_tok=1), "qwen2"),
    "qwen2_moe without biases": (functools.partial(qwen2_moe, qkv_bias=False), "llama"),
    "qwen2_moe, some layers": (functools.partial(qwen2_moe, mlp_only_layers=[1]), "qwen2"),
    "qwen2_moe, each second layer": (functools.partial(qwen2_moe, decoder_sparse_step=2), "qwen2"),
    "qwen2_moe with a window in some layers": (
        functools.partial(qwen2_moe, use_sliding_window=True, sliding_window=8),
        "qwen2",
    ),
    "qwen2_moe with a window and no biases": (
        functools.partial(
            qwen2_moe,
            use_sliding_window=True,
            sliding_window=8,
            qkv_bias=False,
            layer_types=["sliding_attention"] * 3,
        ),
        "mistral",
    ),
    "qwen2_moe, universal": (functools.partial(qwen2_moe, "universal"), "qwen2"),
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_folders(name: str, tmp_path: Path) -> None:
    make, parent = STOCK[name]
    model = make()
    model.save_pretrained(tmp_path / "stock")
    source = read_source(tmp_path / "stock")
    assert source.config["model_type"] == parent
    assert source.upcycling.universal == name.endswith("universal")
    loaded = as_vanilla(tmp_path / "stock", tmp_path / "ours")
    expected = logits(model)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("make", [mixtral, qwen2_moe])
def test_fused_experts(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "fused/model.safetensors"))
    loaded = as_vanilla(tmp_path / "fused", tmp_path / "ours")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


def test_bf16_weights_come_through_bit_for_bit(tmp_path: Path) -> None:
    model = mixtral().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "stock")
    loaded = as_vanilla(tmp_path / "stock", tmp_path / "ours")
    layer = moe_layers(loaded)["model.layers.1.mlp"]
    experts = model.model.layers[1].mlp.experts
    gate_up = torch.cat([layer.experts.weights_EOI[name] for name in ("gate_proj", "up_proj")], dim=1)
    assert torch.equal(gate_up, experts.gate_up_proj)
    assert torch.equal(layer.experts.weights_EOI["down_proj"], experts.down_proj)
    assert layer.router.weight.dtype == torch.float32
    assert torch.equal(layer.router.weight, model.model.layers[1].mlp.gate.weight.float())


def test_a_configuration_may_leave_out_defaults(tmp_path: Path) -> None:
    """Classes differ in their defaults: Mixtral's epsilon and rotary base are not Llama's."""
    model = mixtral()
    model.save_pretrained(tmp_path / "stock")
    file = tmp_path / "stock" / "config.json"
    config = json.loads(file.read_text())
    for key in ("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "sliding_window", "max_position_embeddings"):
        del config[key]
    file.write_text(json.dumps(config))
    loaded = as_vanilla(tmp_path / "stock", tmp_path / "ours")
    assert loaded.config.rms_norm_eps == 1e-5
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


def test_a_llava_around_a_mixtral(tmp_path: Path) -> None:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=mixtral().config, image_token_index=60)
    model = randomized(LlavaForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "stock")
    export(tmp_path / "stock", tmp_path / "ours", layout="vanilla")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert len(moe_layers(loaded)) == 3
    inputs = {"input_ids": torch.tensor([[1, *[60] * 4, 5, 6]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    model.set_experts_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-4)


def test_a_stock_mixtral_compresses(tmp_path: Path) -> None:
    """Experts made from one FFN, deltas that lose nothing: the same logits."""
    model = mixtral()
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight.data = weight.data[:1] + 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "stock")
    source = read_source(tmp_path / "stock")
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**source.config))
    for index, layer in enumerate(base.model.layers):
        experts = model.model.layers[index].mlp.experts
        gate, up = experts.gate_up_proj.data.mean(0).chunk(2)
        layer.mlp.gate_proj.weight.data, layer.mlp.up_proj.weight.data = gate.clone(), up.clone()
        layer.mlp.down_proj.weight.data = experts.down_proj.data.mean(0)
    base.save_pretrained(tmp_path / "base")
    lossless = functools.partial(ders.SparseDelta, sparsity=0.0, rescale=False)
    compress_folder(tmp_path / "stock", tmp_path / "small", base=tmp_path / "base", delta=lossless)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            functools.partial(qwen2_moe, "learned"),
            "weighted by a learned gate, which this architecture has no form for",
        ),
        (functools.partial(qwen2_moe, mlp_only_layers=[0], intermediate_size=40), "dense layers are 40 wide and its"),
        (
            functools.partial(qwen2_moe, use_sliding_window=True, sliding_window=8, qkv_bias=False),
            "window slides in some layers only",
        ),
    ],
)
def test_what_has_no_form_here(make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=message):
        read_source(saved(make(), tmp_path / "m"))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    saved(mixtral(), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelFolderError, match=r"weights are quantised \(fp8\)"):
        read_source(tmp_path / "m")


def test_a_universal_ffn_of_another_width(tmp_path: Path) -> None:
    saved(qwen2_moe(), tmp_path / "m")
    edit(tmp_path / "m", lambda t: {k: torch.ones_like(v) if "shared_expert.down" in k else v for k, v in t.items()})
    with pytest.raises(ModelFolderError, match="is 8 wide and the others 48"):
        read_source(tmp_path / "m")


def edit(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            "layers.1.block_sparse_moe.experts.2.w3",
            r"incomplete: lacks experts\.2\.w3\.weight of model\.layers\.1\.mlp",
        ),
        ("layers.1.block_sparse_moe.gate", r"incomplete: lacks gate\.weight"),
        ("layers.1.block_sparse_moe", r"has experts in layers \[0, 2\], and config\.json names \[0, 1, 2\]"),
    ],
)
def test_incomplete_folders(lost: str, message: str, tmp_path: Path) -> None:
    saved(mixtral(), tmp_path / "m")
    edit(tmp_path / "m", lambda tensors: {name: t for name, t in tensors.items() if lost not in name})
    with pytest.raises(ModelFolderError, match=message):
        read_source(tmp_path / "m")


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "moe_llava_phi", "moe": {}}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ModelFolderError, match=r"pickled \(pytorch_model.bin\).*\n.*save_file"):
        read_source(tmp_path)


def test_a_dense_folder_is_named_as_such(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"no MoE of a known layout \(ders, mixtral, qwen2_moe, moe_llava\)"):
        read_source(saved(dense_model(), tmp_path / "m"))


def moe_llava(dense: Any, folder: Path, **moe: Any) -> Any:
    """A folder as MoE-LLaVA writes it, and the model of ours that it holds."""
    ders.upcycle(dense, num_experts=3, top_k=1, seed=5)
    for layer in moe_layers(dense).values():
        for weight in layer.experts.parameters():
            weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    tensors = {}
    for name, tensor in dense.state_dict().items():
        if ".experts." in name:
            start, projection = name.split(".mlp.")[0], name.split(".")[-1]
            kind = "weight" if "weights_EOI" in name else "bias"
            for e, part in enumerate(tensor):
                experts = f"{start}.mlp.deepspeed_moe.experts.deepspeed_experts"
                tensors[f"{experts}.{e}.{projection}.{kind}"] = part.clone()
        else:
            tensors[name.replace("router.weight", "deepspeed_moe.gate.wg.weight")] = tensor.clone()
    tensors["model.mm_projector.image_spatial_proj.0.weight"] = torch.ones(4, 4)
    tensors["model.image_tower.image_tower.vision_model.post_layernorm.bias"] = torch.ones(4)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {k: v for k, v in dense.config.to_dict().items() if k not in ("quantization_config", "architectures")}
    if config["model_type"] == "stablelm":
        config |= {"rope_pct": config["rope_parameters"].pop("partial_rotary_factor"), "use_qkv_bias": True}
        config["norm_eps"] = config.pop("layer_norm_eps")
    config |= {"model_type": f"moe_llava_{config['model_type']}", "mm_image_tower": "openai/clip-vit-large-patch14-336"}
    layers = [0, 2]
    config["moe"] = {
        "moe_enable": True,
        "moe_mode": "sparse",
        "moe_layers_idx": layers,
        "num_experts": [3] * len(layers),
        "ep_size": 1,
        "top_k_experts": 1,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 64.0,  # nothing is dropped
        "min_capacity": 0,
        "use_residual": False,
        **moe,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return dense.eval()


@pytest.mark.parametrize("family", ["stablelm", "phi"])
def test_moe_llava(family: str, dense_model: Callable[..., Any], tmp_path: Path) -> None:
    dense = dense_model(family)
    if family == "stablelm":  # with what its defaults are not
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        entries = {"use_qkv_bias": True, "layer_norm_eps": 1e-2, "rope_parameters": rope}
        dense = randomized(AutoModelForCausalLM.from_config(AutoConfig.for_model(**dense.config.to_dict() | entries)))
    model = moe_llava(dense, tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"left out: model\.image_tower, model\.mm_projector"):
        export(tmp_path / "theirs", tmp_path / "ours", layout="vanilla")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded.config.model_type == family
    router = moe_layers(loaded)["model.layers.2.mlp"].router
    assert (router.capacity_factor, router.eval_capacity_factor, router.second_choice_noise) == (1.5, 64.0, False)
    expected = logits(model)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_moe_llava_top_2_draws_its_second_choice(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    moe_llava(dense_model("stablelm"), tmp_path / "theirs", top_k_experts=2)
    with pytest.warns(UserWarning, match="second_choice_noise=false"):
        source = read_source(tmp_path / "theirs")
    assert source.upcycling.router["second_choice_noise"]


def test_phi_whose_head_has_no_bias(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    model = moe_llava(dense_model("phi"), tmp_path / "theirs")
    edit(tmp_path / "theirs", lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.bias"})
    model.lm_head.bias.data.zero_()
    with warnings.catch_warnings(action="ignore"):
        loaded = as_vanilla(tmp_path / "theirs", tmp_path / "ours")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("moe", "config", "message"),
    [
        ({"moe_layers_idx": None}, {}, r"config\.json: its moe section lacks moe_layers_idx"),
        ({"use_residual": True}, {}, "use_residual weights a dense FFN"),
        ({"num_experts": [3, 4]}, {}, "different numbers of experts"),
        ({"num_experts": [4, 4]}, {}, r"incomplete: lacks model\.layers\.0\.mlp.*experts\.3\.gate_proj"),
        ({"num_experts": [2, 2]}, {}, "no part of 2 experts"),
        ({}, {"model_type": "moe_llava_qwen"}, "made from a class that transformers does not have"),
    ],
)
def test_moe_llava_that_has_no_form_here(
    moe: dict[str, Any], config: dict[str, Any], message: str, dense_model: Callable[..., Any], tmp_path: Path
) -> None:
    moe_llava(dense_model("stablelm"), tmp_path / "m", **moe)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(ModelFolderError, match=message):
        read_source(tmp_path / "m")
