"""The first Qwen read as a qwen2, against a slow re-implementation of its block in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ders.models.qwen1 import load_qwen1, qwen2_config, qwen2_tensors

CONFIG: dict[str, Any] = {
    "model_type": "qwen",
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 8,
    "vocab_size": 37,
    "layer_norm_epsilon": 1e-3,
    "rotary_emb_base": 500,
    "rotary_pct": 1.0,
    "seq_length": 64,
    "no_bias": True,
    "tie_word_embeddings": False,
}


def qwen1_tensors() -> dict[str, Tensor]:
    """Random tensors of a small first Qwen, by the names and shapes of its files."""
    draw = torch.Generator().manual_seed(0)
    hidden, ffn, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"] // 2, CONFIG["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes["transformer.ln_f.weight"] = (hidden,)
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        shapes |= {f"{layer}.ln_1.weight": (hidden,), f"{layer}.ln_2.weight": (hidden,)}
        shapes |= {f"{layer}.attn.c_attn.weight": (3 * hidden, hidden), f"{layer}.attn.c_attn.bias": (3 * hidden,)}
        shapes |= {f"{layer}.attn.c_proj.weight": (hidden, hidden), f"{layer}.mlp.c_proj.weight": (hidden, ffn)}
        shapes |= {f"{layer}.mlp.w1.weight": (ffn, hidden), f"{layer}.mlp.w2.weight": (ffn, hidden)}
    return {name: torch.randn(shape, generator=draw) * 0.5 for name, shape in shapes.items()}


def write_qwen1(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    half = len(tensors) // 2
    for number, names in enumerate((list(tensors)[:half], list(tensors)[half:]), 1):
        save_file({name: tensors[name] for name in names}, folder / f"model-{number:05}-of-00002.safetensors")
    return folder


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + CONFIG["layer_norm_epsilon"]).sqrt() * weight


def rotate(x_SD: Tensor) -> Tensor:
    """Rotary embedding: entry i of a head turns with entry i + D/2, by position · base^(−2i/D)."""
    out, half = x_SD.clone(), x_SD.shape[1] // 2
    for position in range(x_SD.shape[0]):
        for i in range(half):
            angle = torch.tensor(position * CONFIG["rotary_emb_base"] ** (-i / half), dtype=torch.float64)
            a, b = x_SD[position, i], x_SD[position, i + half]
            out[position, i] = a * angle.cos() - b * angle.sin()
            out[position, i + half] = b * angle.cos() + a * angle.sin()
    return out


def qwen1_logits(tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Qwen-1's forward pass as its own code has it, head by head and position by position."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x_SH, width = w["transformer.wte.weight"][tokens], CONFIG["kv_channels"]
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        y = rms_norm(x_SH, w[f"{layer}.ln_1.weight"])
        mixed = y @ w[f"{layer}.attn.c_attn.weight"].T + w[f"{layer}.attn.c_attn.bias"]
        query, key, value = mixed.split(CONFIG["hidden_size"], dim=-1)
        heads = []
        for start in range(0, CONFIG["hidden_size"], width):
            part = slice(start, start + width)
            q, k = rotate(query[:, part]), rotate(key[:, part])
            rows = [
                torch.softmax(q[t] @ k[: t + 1].T / width**0.5, -1) @ value[: t + 1, part] for t in range(len(tokens))
            ]
            heads.append(torch.stack(rows))
        x_SH = x_SH + torch.cat(heads, -1) @ w[f"{layer}.attn.c_proj.weight"].T
        y = rms_norm(x_SH, w[f"{layer}.ln_2.weight"])
        gate = y @ w[f"{layer}.mlp.w2.weight"].T
        hidden = (y @ w[f"{layer}.mlp.w1.weight"].T) * gate * torch.sigmoid(gate)
        x_SH = x_SH + hidden @ w[f"{layer}.mlp.c_proj.weight"].T
    return rms_norm(x_SH, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T


def test_logits_equal_those_of_the_original_block(tmp_path: Path) -> None:
    tensors = qwen1_tensors()
    model = load_qwen1(write_qwen1(tmp_path / "qwen", tensors), CONFIG, torch.float64).eval()
    tokens = torch.tensor([3, 30, 7, 7, 0, 36, 12, 5, 21])
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    # transformers turns positions in float32.
    torch.testing.assert_close(logits, qwen1_logits(tensors, tokens), rtol=0, atol=5e-6)


def test_configuration_is_translated() -> None:
    config = qwen2_config(CONFIG)
    assert (config.intermediate_size, config.num_key_value_heads, config.rms_norm_eps) == (24, 2, 1e-3)
    assert config.rope_parameters["rope_theta"] == 500
    assert config.max_position_embeddings == 64


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = qwen1_tensors()
    del tensors["transformer.h.1.mlp.w2.weight"]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj"):
        load_qwen1(write_qwen1(tmp_path / "qwen", tensors), CONFIG, torch.float32)


def test_wrong_shape_is_refused(tmp_path: Path) -> None:
    folder = write_qwen1(tmp_path / "qwen", qwen1_tensors())
    with pytest.raises(ValueError, match=r"do not fit config\.json"):
        load_qwen1(folder, CONFIG | {"vocab_size": 40}, torch.float32)


def test_unknown_tensor_is_named() -> None:
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.w3\.weight"):
        qwen2_tensors("transformer.h.0.mlp.w3.weight", torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"no_bias": False}, "no_bias"), ({"rotary_pct": 0.5}, "rotary_pct"), ({"kv_channels": 4}, "kv_channels")],
)
def test_what_qwen2_cannot_hold_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qwen2_config(CONFIG | change)


def test_incomplete_configuration_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="lacks hidden_size, vocab_size"):
        qwen2_config({k: v for k, v in CONFIG.items() if k not in ("hidden_size", "vocab_size")})
