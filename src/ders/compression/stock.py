"""Folders of Hugging Face's Mixtral and Qwen2-MoE as sources, experts one by one on disk or fused."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ders.checkpoint import ModelFolderError, Piece, TensorFolder
from ders.compression.source import MoELayerSource, MoESource, cast, family_of, text_config
from ders.compression.stock_configs import sliding_entries, sliding_layers, translated, with_defaults, with_text
from ders.upcycling import Upcycling

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# What Mixtral's files call them.
MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_PARTS = r"(?:experts|gate|shared_expert|shared_expert_gate)\..+"
_LAYER = re.compile(rf"(.*\blayers\.(\d+))\.(?:mlp|block_sparse_moe)\.({_PARTS})$")


def derived(piece: Piece, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Piece:
    """A piece that is changed when read, its shape kept."""
    return Piece(dtype or piece.dtype, piece.shape, lambda: change(piece.read()))


def is_mixtral(tensors: TensorFolder) -> bool:
    return _is(tensors, "mixtral")


def is_qwen2_moe(tensors: TensorFolder) -> bool:
    return _is(tensors, "qwen2_moe")


def _is(tensors: TensorFolder, model_type: str) -> bool:
    return text_config(tensors.config()).get("model_type") == model_type


def read_mixtral(tensors: TensorFolder) -> MoESource:
    """A stock Mixtral folder, or a LLaVA around one: its parent is a Mistral, or a Llama where no window slides."""
    config = tensors.config()
    text = with_defaults(text_config(config))
    if text["sliding_window"] is None:
        dense = translated(text, "llama", attention_bias=False, mlp_bias=False)
    else:
        dense = translated(text, "mistral", sliding_window=text["sliding_window"])
    upcycling = Upcycling(
        num_experts=text["num_local_experts"],
        top_k=text["num_experts_per_tok"],
        layers=tuple(range(text["num_hidden_layers"])),
        router={"name": "TopKRouter", "renormalize": True},
    )
    return _source(tensors, with_text(config, dense), upcycling)


def read_qwen2_moe(tensors: TensorFolder) -> MoESource:
    """A stock Qwen2-MoE folder, or a LLaVA around one.

    A shared expert that adds nothing is left out; one that every token gets with weight one comes back as the
    universal FFN.

    Raises:
        ModelFolderError: the shared expert is weighted by a learned gate, dense layers and experts differ in width, or
            only some layers slide their window where no dense class without biases can say so.
    """
    config = tensors.config()
    text = with_defaults(text_config(config))
    num_layers, only_dense = text["num_hidden_layers"], text["mlp_only_layers"] or []
    layers = tuple(i for i in range(num_layers) if i not in only_dense and (i + 1) % text["decoder_sparse_step"] == 0)
    width = text["moe_intermediate_size"]
    if len(layers) < num_layers and text["intermediate_size"] != width:
        raise ModelFolderError(
            f"{tensors.folder}: its dense layers are {text['intermediate_size']} wide and its experts {width}: experts "
            "here are made from dense FFNs and have their width, so this model has no form here"
        )
    dense = _dense_of_qwen2_moe(tensors, {**text, "intermediate_size": width})
    upcycling = Upcycling(
        num_experts=text["num_experts"],
        top_k=text["num_experts_per_tok"],
        layers=layers,
        router={"name": "TopKRouter", "renormalize": bool(text["norm_topk_prob"])},
    )
    return _source(tensors, with_text(config, dense), upcycling)


def _dense_of_qwen2_moe(tensors: TensorFolder, text: dict[str, Any]) -> dict[str, Any]:
    if text["qkv_bias"]:
        return translated(text, "qwen2", **sliding_entries(text))
    sliding = sliding_layers(text)
    if not any(sliding):
        return translated(text, "llama", attention_bias=False, mlp_bias=False)
    if all(sliding):
        return translated(text, "mistral", sliding_window=text["sliding_window"])
    raise ModelFolderError(
        f"{tensors.folder}: attention without biases whose window slides in some layers only: no dense class (Llama, "
        "Mistral, Qwen2) is built like this"
    )


def _source(tensors: TensorFolder, config: dict[str, Any], upcycling: Upcycling) -> MoESource:
    if quantization := tensors.config().get("quantization_config"):
        raise ModelFolderError(
            f"{tensors.folder}: its weights are quantised ({quantization.get('quant_method')}): give the folder they "
            "were made from, in full precision"
        )
    found: dict[int, tuple[str, dict[str, Piece]]] = {}
    rest: dict[str, Piece] = {}
    for name, piece in tensors.pieces.items():
        if match := _LAYER.match(name):
            found.setdefault(int(match[2]), (f"{match[1]}.mlp", {}))[1][match[3]] = piece
        else:
            rest[name] = piece
    if tuple(sorted(found)) != upcycling.layers:
        raise ModelFolderError(
            f"{tensors.folder}: has experts in layers {sorted(found)}, and config.json names {list(upcycling.layers)}: "
            "the folder is incomplete, or the configuration is another model's"
        )
    layers, universal = {}, set()
    for index in upcycling.layers:
        prefix, named = found[index]
        layer = layers[index] = MoELayerSource(prefix, _experts(tensors, prefix, named, upcycling.num_experts))
        layer.others["router.weight"] = cast(_take(tensors, prefix, named, "gate.weight"), torch.float32)
        shared = _shared_expert(tensors, prefix, named, layer.experts["down_proj"][0].shape)
        layer.others |= shared
        universal.add(bool(shared))
    if len(universal) > 1:
        raise ModelFolderError(f"{tensors.folder}: the shared expert adds to some layers only, which has no form here")
    return MoESource(
        tensors.folder,
        config,
        family_of(config, tensors.folder),
        dataclasses.replace(upcycling, universal=universal == {True}),
        layers,
        rest,
    )


def _take(tensors: TensorFolder, prefix: str, named: dict[str, Piece], name: str) -> Piece:
    if name not in named:
        raise ModelFolderError(f"{tensors.folder}: incomplete: lacks {name} of {prefix}")
    return named[name]


def _experts(tensors: TensorFolder, prefix: str, named: dict[str, Piece], count: int) -> dict[str, list[Piece]]:
    if "experts.gate_up_proj" in named:
        fused = _take(tensors, prefix, named, "experts.gate_up_proj")
        down = _take(tensors, prefix, named, "experts.down_proj")
        if len({count, fused.shape[0], down.shape[0]}) > 1:
            raise ModelFolderError(
                f"{tensors.folder}: {prefix} holds {fused.shape[0]} experts, config.json says {count}"
            )
        halves = {"gate_proj": 0, "up_proj": 1}
        experts = {name: [_half(fused[e], half) for e in range(count)] for name, half in halves.items()}
        return experts | {"down_proj": [down[e] for e in range(count)]}
    alias = MIXTRAL_NAMES if "experts.0.w1.weight" in named else {name: name for name in PROJECTIONS}
    return {
        name: [_take(tensors, prefix, named, f"experts.{e}.{alias[name]}.weight") for e in range(count)]
        for name in PROJECTIONS
    }


def _half(fused: Piece, half: int) -> Piece:
    """Rows of the gate (0) or of the up projection (1)."""
    rows = fused.shape[0] // 2
    return Piece(fused.dtype, (rows, *fused.shape[1:]), lambda: fused.read()[half * rows : (half + 1) * rows])


def _shared_expert(
    tensors: TensorFolder, prefix: str, named: dict[str, Piece], shape: tuple[int, ...]
) -> dict[str, Piece]:
    """The universal FFN that a shared expert is; nothing where it adds nothing.

    sigmoid(0) = 1/2, so a gate of zeros and an output projection twice as large give weight one, exactly.
    """
    if not any(name.startswith("shared_expert") for name in named):
        return {}
    weights = {name: _take(tensors, prefix, named, f"shared_expert.{name}.weight") for name in PROJECTIONS}
    if not weights["down_proj"].read().any():
        return {}
    if _take(tensors, prefix, named, "shared_expert_gate.weight").read().any():
        raise ModelFolderError(
            f"{tensors.folder}: the shared expert of {prefix} is weighted by a learned gate, which this architecture "
            "has no form for: only a shared expert that every token gets with weight one (the universal FFN), or one "
            "that adds nothing, can be read"
        )
    if weights["down_proj"].shape != shape:
        raise ModelFolderError(
            f"{tensors.folder}: the shared expert of {prefix} is {weights['down_proj'].shape[1]} wide and the others "
            f"{shape[1]}: a universal FFN here has the experts' width"
        )
    weights["down_proj"] = derived(weights["down_proj"], lambda tensor: tensor / 2)
    return {f"universal.{name}.weight": piece for name, piece in weights.items()}
