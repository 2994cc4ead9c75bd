"""The layouts a trained MoE can be exported to: which tensors a file then holds, and its `config.json`.

E experts, D model width, F FFN width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ders.checkpoint import ModelFolderError, Piece, Slot
from ders.compression.own import as_vanilla
from ders.compression.source import MoELayerSource, MoESource, cast, text_config
from ders.compression.stock import MIXTRAL_NAMES, PROJECTIONS, derived
from ders.compression.stock_configs import sliding_entries, sliding_layers, translated, with_defaults, with_text

# Of a shared expert that adds nothing: other engines refuse an empty one.
_NEUTRAL_WIDTH = 8


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: the pieces it is made of, one after the other."""

    slot: Slot
    pieces: list[Piece]


@dataclass(frozen=True)
class Layout:
    """What will be written.

    Attributes:
        config: of the new folder, without a `ders` section.
        tensors: those of a projection's experts lie together, in order, for deltas are unpacked once.
        section: the `ders` section, where the layout is ours, without its provenance.
    """

    config: dict[str, Any]
    tensors: list[Stored]
    section: dict[str, Any] | None = None


def vanilla(source: MoESource) -> Layout:
    """Our own layout with full experts: exact for every model, and ready to be compressed."""
    count, tensors = source.upcycling.num_experts, _rest(source)
    for layer in source.layers.values():
        for name, stack in layer.experts.items():
            tensors.append(_stacked(f"{layer.prefix}.experts.weights_EOI.{name}", stack[:count]))
            tensors += [_single(f"{layer.prefix}.universal.{name}.weight", piece) for piece in stack[count:]]
        for name, biases in layer.biases.items():
            tensors.append(_stacked(f"{layer.prefix}.experts.biases_EO.{name}", biases[:count]))
            tensors += [_single(f"{layer.prefix}.universal.{name}.bias", piece) for piece in biases[count:]]
        tensors += [_single(f"{layer.prefix}.{name}", piece) for name, piece in layer.others.items()]
    return Layout(source.config, tensors, as_vanilla(source.upcycling).to_section())


def mixtral(source: MoESource) -> Layout:
    """Hugging Face's Mixtral, under the names it writes by default.

    The router takes the model's type: Mixtral computes its logits in that type, ours in fp32.
    """
    text = with_defaults(_stock_text(source, "mixtral"))
    upcycling, sliding = source.upcycling, sliding_layers(text)
    if text["model_type"] == "qwen2":
        _refuse(source, "mixtral", "its attention has biases, and Mixtral's has none", "qwen2_moe")
    if len(upcycling.layers) < text["num_hidden_layers"]:
        _refuse(source, "mixtral", "some of its layers are dense, and every layer of Mixtral is an MoE", "qwen2_moe")
    if upcycling.universal:
        _refuse(source, "mixtral", "it has a universal FFN, and Mixtral has no place for one", "qwen2_moe")
    if not _renormalizes(source):
        _refuse(source, "mixtral", "its gate is the raw probability, and Mixtral renormalises it", "qwen2_moe")
    tensors = _rest(source)
    for layer in source.layers.values():
        prefix = f"{layer.prefix.removesuffix('.mlp')}.block_sparse_moe"
        for name in PROJECTIONS:
            for e, piece in enumerate(layer.experts[name]):
                tensors.append(_single(f"{prefix}.experts.{e}.{MIXTRAL_NAMES[name]}.weight", piece))
        tensors.append(_single(f"{prefix}.gate.weight", _gate(source, layer)))
    entries = {
        "sliding_window": text["sliding_window"] if any(sliding) else None,
        "num_local_experts": upcycling.num_experts,
        "num_experts_per_tok": upcycling.top_k,
        "router_jitter_noise": 0.0,
    }
    return Layout(with_text(source.config, translated(text, "mixtral", **entries)), tensors)


def qwen2_moe(source: MoESource) -> Layout:
    """Hugging Face's Qwen2-MoE, under the names it writes by default; the better target for most models.

    A universal FFN becomes the shared expert: its gate of zeros gives 1/2, its output projection is doubled. Without
    one the shared expert's output is zero. The router takes the model's type, as for Mixtral.
    """
    text = with_defaults(_stock_text(source, "qwen2_moe"))
    upcycling, width = source.upcycling, text["intermediate_size"]
    tensors, in_layers = _rest(source), set(upcycling.layers)
    for layer in source.layers.values():
        for name in PROJECTIONS:
            stack = layer.experts[name]
            for e, piece in enumerate(stack[: upcycling.num_experts]):
                tensors.append(_single(f"{layer.prefix}.experts.{e}.{name}.weight", piece))
            shared = _shared(source, layer, name)
            if upcycling.universal and name == "down_proj":
                shared = derived(shared, lambda tensor: 2 * tensor)
            tensors.append(_single(f"{layer.prefix}.shared_expert.{name}.weight", shared))
        gate = _gate(source, layer)
        tensors.append(_single(f"{layer.prefix}.gate.weight", gate))
        tensors.append(_single(f"{layer.prefix}.shared_expert_gate.weight", _zeros(gate.dtype, 1, gate.shape[1])))
    entries = {
        **sliding_entries(text),
        "qkv_bias": text["model_type"] == "qwen2",
        "num_experts": upcycling.num_experts,
        "num_experts_per_tok": upcycling.top_k,
        "norm_topk_prob": _renormalizes(source),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width if upcycling.universal else _NEUTRAL_WIDTH,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(text["num_hidden_layers"]) if i not in in_layers],
    }
    return Layout(with_text(source.config, translated(text, "qwen2_moe", **entries)), tensors)


LAYOUTS: dict[str, Callable[[MoESource], Layout]] = {"vanilla": vanilla, "mixtral": mixtral, "qwen2_moe": qwen2_moe}


def _refuse(source: MoESource, layout: str, why: str, instead: str) -> None:
    raise ModelFolderError(f"{source.folder}: layout={layout} cannot express it: {why}. layout={instead} can")


def _stock_text(source: MoESource, layout: str) -> dict[str, Any]:
    """The dense text configuration, of a model that some stock class could express.

    Raises:
        ModelFolderError: none could.
    """
    text, router, upcycling = text_config(source.config), source.upcycling.router, source.upcycling
    limit = router.get("eval_capacity_factor")
    model_type = text["model_type"]
    why = None
    if model_type not in ("llama", "mistral", "qwen2"):
        why = f"neither Mixtral nor Qwen2-MoE has the layers of {model_type} (norms, biases, rotary embedding)"
    elif text.get("attention_bias"):
        why = (
            "its attention has biases in all four projections (attention_bias), which neither Mixtral nor Qwen2-MoE has"
        )
    elif any(layer.biases for layer in source.layers.values()) or text.get("mlp_bias"):
        why = "its FFNs have biases, which neither Mixtral nor Qwen2-MoE has"
    elif router["name"] != "TopKRouter":
        why = f"its router is {router['name']}, which neither Mixtral nor Qwen2-MoE has"
    elif router.get("bias"):
        why = "its router has a bias, which stock routers have not"
    elif upcycling.universal and upcycling.universal_weight != "one":
        why = "its universal FFN is weighted by what the gates leave over, and a shared expert has a gate of its own"
    elif limit is not None and limit * upcycling.top_k < upcycling.num_experts:  # else each expert may take every token
        why = "its router drops choices over capacity in evaluation, and stock routers drop nothing"
    elif router.get("second_choice_noise"):
        why = "its router draws second choices with noise in evaluation too, and stock routers do not"
    if why is not None:
        _refuse(source, layout, why, "vanilla")
    return text


def _renormalizes(source: MoESource) -> bool:
    chosen = source.upcycling.router.get("renormalize")
    return source.upcycling.top_k > 1 if chosen is None else bool(chosen)


def _gate(source: MoESource, layer: MoELayerSource) -> Piece:
    return cast(layer.others["router.weight"], source.dtype)


def _shared(source: MoESource, layer: MoELayerSource, name: str) -> Piece:
    """One matrix of the shared expert: of the universal FFN, or of zeros."""
    stack = layer.experts[name]
    if source.upcycling.extended:
        return stack[source.upcycling.num_experts]
    if source.upcycling.universal:
        return layer.others[f"universal.{name}.weight"]
    out_features, in_features = stack[0].shape
    if name == "down_proj":
        return _zeros(source.dtype, out_features, _NEUTRAL_WIDTH)
    return _zeros(source.dtype, _NEUTRAL_WIDTH, in_features)


def _zeros(dtype: torch.dtype, *shape: int) -> Piece:
    return Piece(dtype, shape, lambda: torch.zeros(shape, dtype=dtype))


def _rest(source: MoESource) -> list[Stored]:
    return [_single(name, piece) for name, piece in source.rest.items()]


def _single(name: str, piece: Piece) -> Stored:
    return Stored(Slot(name, piece.dtype, piece.shape), [piece])


def _stacked(name: str, pieces: Iterable[Piece]) -> Stored:
    stack = list(pieces)
    return Stored(Slot(name, stack[0].dtype, (len(stack), *stack[0].shape)), stack)
