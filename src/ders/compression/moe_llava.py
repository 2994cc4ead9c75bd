"""Folders of MoE-LLaVA (github.com/PKU-YuanGroup/MoE-LLaVA), whose MoE layers are DeepSpeed's, as sources.

Only the language model is read. Such a folder names its vision tower and does not describe it (heads, activation), so
that a whole LLaVA cannot be made from it alone.
"""

import re
import warnings
from typing import Any

import torch

from ders.checkpoint import ModelFolderError, Piece, TensorFolder
from ders.compression.source import MoELayerSource, MoESource, cast, family_of
from ders.upcycling import Family, Upcycling

# The dense class a `model_type` of theirs is made from.
_DENSE = {
    "moe_llava_stablelm": ("stablelm", "StableLmForCausalLM"),
    "moe_llava_phi": ("phi", "PhiForCausalLM"),
    "moe_llava_llama": ("llama", "LlamaForCausalLM"),
    "moe_llava_mistral": ("mistral", "MistralForCausalLM"),
    "moe_llava_qwen1_5": ("qwen2", "Qwen2ForCausalLM"),
}
_TEXT = re.compile(r"lm_head\.|model\.(?:embed_tokens|layers|norm|final_layernorm)\.")
_EXPERT = "deepspeed_moe.experts.deepspeed_experts"
_LIMITS = ("capacity_factor", "eval_capacity_factor", "min_capacity")
# Entries about images and training: nothing of the language model.
_NOT_TEXT = re.compile(r"moe$|lora|mm_|image_|video_|use_mm|tune_mm|freeze_|tokenizer_|auto_map|rope_pct|norm_eps")


def is_moe_llava(tensors: TensorFolder) -> bool:
    config = tensors.config()
    return str(config.get("model_type")).startswith("moe_llava") and "moe" in config


def read_moe_llava(tensors: TensorFolder) -> MoESource:
    """The language model of a MoE-LLaVA folder; a warning names what was left out.

    The router is DeepSpeed's as it was trained and published: capacity limits, and with top-2 a noisy second choice,
    in evaluation too.

    Raises:
        ModelFolderError: a parent class that transformers does not have, layers with different numbers of experts, or
            DeepSpeed's residual MoE.
    """
    config = tensors.config()
    model_type, moe = config["model_type"], config["moe"]
    if model_type not in _DENSE:
        raise ModelFolderError(
            f"{tensors.folder}: model_type {model_type!r} is made from a class that transformers does not have; known "
            f"are {', '.join(_DENSE)}"
        )
    missing = [key for key in ("num_experts", "moe_layers_idx", "top_k_experts", *_LIMITS) if moe.get(key) is None]
    if missing:
        raise ModelFolderError(f"{tensors.folder / 'config.json'}: its moe section lacks {', '.join(missing)}")
    if moe.get("use_residual"):
        raise ModelFolderError(
            f"{tensors.folder}: use_residual weights a dense FFN and the experts by a learned gate, which this "
            "architecture has no form for"
        )
    numbers = moe["num_experts"] if isinstance(moe["num_experts"], list) else [moe["num_experts"]]
    if len(set(numbers)) != 1:
        raise ModelFolderError(f"{tensors.folder}: layers have different numbers of experts ({numbers})")
    rest = {name: piece for name, piece in tensors.pieces.items() if _TEXT.match(name) and "rotary_emb" not in name}
    dense = _dense_config(config, rest)
    family = family_of(dense, tensors.folder)
    top_k = moe["top_k_experts"]
    upcycling = Upcycling(
        num_experts=numbers[0],
        top_k=top_k,
        layers=tuple(sorted(moe["moe_layers_idx"])),
        router={
            "name": "TopKRouter",
            "second_choice_noise": top_k == 2,
            **{key: moe[key] for key in _LIMITS},
        },
    )
    layers = {index: _layer(tensors, family, index, upcycling.num_experts, rest) for index in upcycling.layers}
    if model_type == "moe_llava_phi" and "lm_head.bias" not in rest:  # Phi's own head has one
        head = rest["lm_head.weight"]
        rest["lm_head.bias"] = Piece(head.dtype, head.shape[:1], lambda: torch.zeros(head.shape[0], dtype=head.dtype))
    _tell_what_is_left_out(tensors, top_k)
    return MoESource(tensors.folder, dense, family, upcycling, layers, rest)


def _dense_config(config: dict[str, Any], rest: dict[str, Piece]) -> dict[str, Any]:
    model_type, architecture = _DENSE[config["model_type"]]
    dense = {key: value for key, value in config.items() if not _NOT_TEXT.match(key)}
    if model_type == "stablelm":  # these folders have the names of before it was part of transformers
        dense.setdefault("partial_rotary_factor", config.get("rope_pct", 0.25))
        dense.setdefault("layer_norm_eps", config.get("norm_eps", 1e-5))
        dense["use_qkv_bias"] = "model.layers.0.self_attn.q_proj.bias" in rest
    return dense | {"model_type": model_type, "architectures": [architecture]}


def _layer(
    tensors: TensorFolder, family: Family, index: int, num_experts: int, rest: dict[str, Piece]
) -> MoELayerSource:
    """One layer; its tensors are taken out of `rest`."""
    prefix = f"model.layers.{index}.mlp"

    def take(name: str) -> Piece:
        if f"{prefix}.{name}" not in rest:
            raise ModelFolderError(f"{tensors.folder}: incomplete: lacks {prefix}.{name}")
        return rest.pop(f"{prefix}.{name}")

    projections = family.ffn.projections
    weights = {name: [take(f"{_EXPERT}.{e}.{name}.weight") for e in range(num_experts)] for name in projections}
    layer = MoELayerSource(prefix, weights)
    for name in projections:
        if f"{prefix}.{_EXPERT}.0.{name}.bias" in rest:
            layer.biases[name] = [take(f"{_EXPERT}.{e}.{name}.bias") for e in range(num_experts)]
    layer.others["router.weight"] = cast(take("deepspeed_moe.gate.wg.weight"), torch.float32)
    if unread := [name for name in rest if name.startswith(f"{prefix}.")]:
        raise ModelFolderError(
            f"{tensors.folder}: {unread[0]} is no part of {num_experts} experts and a router, which config.json says"
        )
    return layer


def _tell_what_is_left_out(tensors: TensorFolder, top_k: int) -> None:
    left = sorted({".".join(name.split(".")[:2]) for name in tensors.pieces if not _TEXT.match(name)})
    notes = []
    if left:
        notes.append(
            f"only the language model is read; left out: {', '.join(left)} (the folder does not describe its vision "
            "tower)"
        )
    if top_k == 2:
        notes.append(
            "its router draws the second choice with noise, in evaluation too, as it was trained: "
            "second_choice_noise=false under router in the new config.json makes it deterministic"
        )
    if notes:
        warnings.warn(f"{tensors.folder}: {'; '.join(notes)}", stacklevel=3)
