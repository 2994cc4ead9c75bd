"""The first Qwen (Qwen-1.8B, 7B, 14B), whose own code transformers does not hold, read as a qwen2."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from ders.checkpoint import TensorFolder

MODEL_TYPE = "qwen"

_OUTSIDE = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_IN_LAYER = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    # Qwen computes w1(x) * silu(w2(x)): w2 is the gate.
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
_FUSED = ("attn.c_attn.weight", "attn.c_attn.bias")


def qwen2_config(config: dict[str, Any]) -> Qwen2Config:
    """The qwen2 configuration of a first Qwen's `config.json`.

    Equal up to `seq_length` positions; beyond them the original changes its rotary base and scales its queries.

    Raises:
        ValueError: an entry is missing, or the model has parts that qwen2 has no place for.
    """
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if key not in config]
    if missing:
        raise ValueError(f"config.json of a first Qwen lacks {', '.join(missing)}")
    head_dim = config.get("kv_channels", 128)
    if head_dim * config["num_attention_heads"] != config["hidden_size"]:
        raise ValueError("a first Qwen whose kv_channels · num_attention_heads is not its hidden_size cannot be read")
    if not config.get("no_bias", True) or config.get("rotary_pct", 1.0) != 1.0:
        raise ValueError("a first Qwen with no_bias=false or rotary_pct below 1 cannot be read as a qwen2")
    return Qwen2Config(
        hidden_size=config["hidden_size"],
        # Qwen counts the gate and the up matrix together.
        intermediate_size=config["intermediate_size"] // 2,
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        rms_norm_eps=config.get("layer_norm_epsilon", 1e-6),
        rope_theta=float(config.get("rotary_emb_base", 10000)),
        max_position_embeddings=config.get("seq_length", 8192),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )


def qwen2_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a first Qwen under its name in qwen2: itself, or the three thirds of `c_attn`.

    Raises:
        ValueError: a first Qwen has no tensor of that name.
    """
    if name in _OUTSIDE:
        return {_OUTSIDE[name]: tensor}
    found = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
    layer, inner = found.groups() if found else ("", "")
    if inner in _IN_LAYER:
        return {f"model.layers.{layer}.{_IN_LAYER[inner]}": tensor}
    if inner in _FUSED:
        attention, kind = f"model.layers.{layer}.self_attn", inner.rsplit(".", 1)[1]
        # Copies: three parameters in one memory would be saved as one.
        return {
            f"{attention}.{which}_proj.{kind}": third.clone()
            for which, third in zip("qkv", tensor.chunk(3), strict=True)
        }
    raise ValueError(f"{name} is no tensor of a first Qwen")


def load_qwen1(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Qwen2ForCausalLM:
    """The weights of a first Qwen's folder (safetensors) in transformers' qwen2.

    Args:
        config: the folder's `config.json`.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape than the configuration says.
    """
    state: dict[str, Tensor] = {}
    for name, piece in TensorFolder(folder).pieces.items():
        state |= qwen2_tensors(name, piece.read())
    try:
        model, report = Qwen2ForCausalLM.from_pretrained(
            None, config=qwen2_config(config), state_dict=state, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit config.json: {error}") from error
    if report["missing_keys"]:
        raise ValueError(f"{folder}: lacks the weights of {sorted(report['missing_keys'])[:3]}")
    return model
