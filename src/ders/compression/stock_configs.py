"""`config.json` of Hugging Face's own MoE classes, and of the dense classes they are made from, as plain data.

A configuration may leave out what its class has as default, and classes differ in their defaults: a translation
writes out everything that a forward pass depends on.
"""

from typing import Any

_LLAMA_LIKE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN2 = {
    **_LLAMA_LIKE,
    "vocab_size": 151936,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# What each class takes for an absent entry.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE | {"num_key_value_heads": None, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _LLAMA_LIKE | {"sliding_window": 4096},
    "qwen2": _QWEN2,
    "mixtral": _LLAMA_LIKE
    | {"rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": _QWEN2
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "qkv_bias": True,
    },
}
# Entries that only some of the classes have; a translation drops them and writes the target's.
_ATTENTION_ONLY = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_DENSE_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp")
_MOE_ONLY = (
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "qkv_bias",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
)
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
}


def with_defaults(text: dict[str, Any]) -> dict[str, Any]:
    """A text configuration with its class's defaults written out."""
    model_type = text["model_type"]
    full = _DEFAULTS[model_type] | text
    if "rope_theta" not in full and "rope_theta" not in (full.get("rope_parameters") or {}):
        full["rope_theta"] = 1e6 if model_type == "mixtral" else 1e4
    if full.get("head_dim", 0) is None:  # some classes take null for a number here
        del full["head_dim"]
    return full


def sliding_layers(text: dict[str, Any]) -> list[bool]:
    """Of each layer, whether its attention has a sliding window; `text` has its defaults written out."""
    count = text["num_hidden_layers"]
    if text["model_type"] in ("llama", "mistral", "mixtral"):
        return [text.get("sliding_window") is not None] * count
    if text.get("layer_types") is not None:
        return [kind == "sliding_attention" for kind in text["layer_types"]]
    if not text["use_sliding_window"]:
        return [False] * count
    if text["model_type"] == "qwen2":
        return [layer >= text["max_window_layers"] for layer in range(count)]
    return [layer % 2 == 0 and layer < text["max_window_layers"] for layer in range(count)]


def translated(text: dict[str, Any], model_type: str, **entries: Any) -> dict[str, Any]:
    """A text configuration as one of another class: what all classes share, and `entries`.

    Args:
        text: with its defaults written out.
    """
    dropped = (*_ATTENTION_ONLY, *_DENSE_ONLY, *_MOE_ONLY, "auto_map", "quantization_config")
    kept = {key: value for key, value in text.items() if key not in dropped}
    if "architectures" in kept:
        kept["architectures"] = [_CLASSES[model_type]]
    return kept | {"model_type": model_type, **entries}


def sliding_entries(text: dict[str, Any]) -> dict[str, Any]:
    """A window as the Qwen classes write it, layer by layer."""
    sliding = sliding_layers(text)
    return {
        "use_sliding_window": any(sliding),
        "sliding_window": text.get("sliding_window"),
        "max_window_layers": text.get("max_window_layers", text["num_hidden_layers"]),
        "layer_types": ["sliding_attention" if here else "full_attention" for here in sliding],
    }


def with_text(config: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose language model is another."""
    return {**config, "text_config": text} if config.get("text_config") else text
