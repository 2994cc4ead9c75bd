"""The one place where model families are named: how each builds its feed-forward networks."""

from dataclasses import dataclass

from torch import nn

from ders.moe import FFN


@dataclass(frozen=True)
class Family:
    """Where a decoder keeps its layers, and the FFN inside a layer.

    Attributes:
        ffn: the form of the FFN.
        mlp: the FFN's name inside a decoder layer.
        layers: the list of layers inside the decoder.
    """

    ffn: FFN
    mlp: str = "mlp"
    layers: str = "layers"


_LLAMA = Family(FFN(inputs=("gate_proj", "up_proj"), output="down_proj", activation="act_fn"))
_FUSED = Family(FFN(inputs=("gate_up_proj",), output="down_proj", activation="activation_fn"))

# Keyed by the `model_type` of a Hugging Face configuration.
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "stablelm": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "olmo2": _LLAMA,
    "phi3": _FUSED,
    "glm": _FUSED,
    "phi": Family(FFN(inputs=("fc1",), output="fc2", activation="activation_fn", gated=False)),
    "gpt_neox": Family(
        FFN(inputs=("dense_h_to_4h",), output="dense_4h_to_h", activation="act", gated=False),
    ),
}


def hidden_side(projection: str) -> tuple[str, int]:
    """Which side of an FFN's matrix is the hidden one, `rows` or `columns`, and how often it holds all hidden neurons.

    By the projection's name, which means one thing in all families.

    Raises:
        ValueError: no family has such a projection.
    """
    for family in FAMILIES.values():
        if projection == family.ffn.output:
            return "columns", 1
        if projection in family.ffn.inputs:
            return "rows", 1 + family.ffn.gated if len(family.ffn.inputs) == 1 else 1
    raise ValueError(f"no known family has a projection {projection!r} in its FFN")


def require_family(model_type: str) -> Family:
    """The row of a `model_type`.

    Raises:
        ValueError: there is none.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"unknown model family {model_type!r}. Known families: {', '.join(FAMILIES)}. A new one is one row in "
            "ders/upcycling/families.py"
        )
    return FAMILIES[model_type]


def find_decoder(model: nn.Module) -> tuple[str, nn.Module, Family]:
    """The module name, the module and the family of the text decoder inside a model (a LLaVA's language model, say).

    Raises:
        ValueError: no module of the model is a decoder of a known family.
    """
    seen = []
    for name, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        seen.append(model_type)
        family = FAMILIES.get(str(model_type))
        if family is not None and isinstance(getattr(module, family.layers, None), nn.ModuleList):
            return name, module, family
    types = sorted({str(t) for t in seen if t is not None}) or ["no model_type"]
    raise ValueError(
        f"no decoder of a known family in {type(model).__name__} ({', '.join(types)}). Known families: "
        f"{', '.join(FAMILIES)}. A new one is one row in ders/upcycling/families.py"
    )
