"""A LLaVA from a language model and a vision tower."""

import math
from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


def assemble_llava(
    language: Any, tower: nn.Module, *, image_token: int, feature_layer: int, select_strategy: str = "default"
) -> LlavaForConditionalGeneration:
    """The two models, not copies of them, in one LLaVA, joined by a fresh two-layer projector (torch's generator).

    Args:
        image_token: id of the token that stands for a visual token.
        feature_layer: which hidden layer of the tower the projector reads.
        select_strategy: `default` leaves out the first token of the tower, `full` none.

    Raises:
        ValueError: the language model's head has a bias that cannot be folded (`fold_head_bias`).
    """
    fold_head_bias(language)
    config = LlavaConfig(
        text_config=language.config,
        vision_config=tower.config,
        image_token_index=image_token,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=select_strategy,
    )
    with torch.device("meta"):  # only the frame is needed
        model = LlavaForConditionalGeneration(config)
    model.model.language_model = language.get_decoder()
    model.model.vision_tower = tower
    # Drawn as nn.Linear draws, which is how LLaVA's own projector starts.
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.lm_head = language.get_output_embeddings()
    model.generation_config = language.generation_config
    return model.eval()


@torch.no_grad()
def fold_head_bias(language: Any) -> None:
    """Move the bias of a language model's head into its weight, in place: the logits stay, up to rounding.

    Phi's head W has a bias b, the head of a LLaVA has none. The head reads g ∘ n + c, with n a normalised vector and
    g, c the final LayerNorm's. As the entries of n sum to zero, v = 1/g is orthogonal to every g ∘ n: W + u vᵀ acts
    on those as W does, and the constant part is free to give b. c moves by ±g beforehand, lest v · c be near zero.

    Raises:
        ValueError: the head has a bias, and no LayerNorm with a scale before it, or is tied to the embeddings.
    """
    head, norm = language.get_output_embeddings(), getattr(language.get_decoder(), "final_layernorm", None)
    if head.bias is None:
        return
    if not isinstance(norm, nn.LayerNorm) or (norm.weight == 0).any():
        raise ValueError(f"the head of {type(language).__name__} has a bias, for which a LLaVA has no place")
    if head.weight is language.get_input_embeddings().weight:
        raise ValueError(f"the head of {type(language).__name__} has a bias and is tied to the embeddings")
    v = 1 / norm.weight
    moved = math.copysign(1.0, float(v @ norm.bias))
    u = head.bias - moved * (head.weight @ norm.weight)
    norm.bias += moved * norm.weight
    head.weight.addr_(u / (v @ norm.bias), v)
    head.bias = None
