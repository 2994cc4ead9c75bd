"""Whole models of real shapes and random weights: dense, and upcycled or compressed in every way that is measured."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ders.compression import compress
from ders.evaluation.layers import METHODS, THIN, fill_, perturb_
from ders.evaluation.synthetic import STABLELM_2_1_6B
from ders.models.tiny import TinyLlava
from ders.moe import SharedBaseMoE, VanillaMoE, moe_layers, take_routings
from ders.upcycling import set_trainable, upcycle

DENSE, VANILLA = "dense", "vanilla: ours"
FORMS = (DENSE, VANILLA, *METHODS)

SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
PHI_2 = {
    "model_type": "phi",
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "partial_rotary_factor": 0.4,
    "max_position_embeddings": 2048,
}
# What MoE-LLaVA multiplies the routers' losses by.
BALANCE = 0.01
_CONF = Path(__file__).resolve().parents[3] / "conf"


def _tiny_llava() -> nn.Module:
    """The small LLaVA of the repository's own configuration, on its digits."""
    model, data = (yaml.safe_load((_CONF / f).read_text()) for f in ("model/tiny_llava.yaml", "data/digits_vqa.yaml"))
    sizes = {key: data[key] for key in ("image_size", "patch_size")}
    return TinyLlava(
        text=model["text"], vision={**model["vision"], **sizes}, feature_layer=model["feature_layer"]
    ).dense()


def _language_model(shapes: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tiny_llava": _tiny_llava,
    "SmolLM2-135M's shapes": _language_model(SMOLLM2_135M),
    "StableLM-2-1.6B's shapes": _language_model(STABLELM_2_1_6B),
    "Phi-2's shapes": _language_model(PHI_2),
}
MODELS_CPU = ("tiny_llava", "SmolLM2-135M's shapes")


def shares(names: tuple[str, ...]) -> list[float]:
    """Weights for the time of each model: the tiny one's rounds are short."""
    return [1.0 if name == "tiny_llava" else 4.0 for name in names]


def dense_model(name: str, device: str, dtype: torch.dtype) -> Any:
    """Random weights, the same each time."""
    torch.manual_seed(0)
    with torch.device(device):
        return MODELS[name]().to(dtype)


def make_form(dense: nn.Module, form: str) -> Any:
    """A copy of the dense model, every other FFN made a filled MoE layer of 4 experts, top-2, as in the paper."""
    torch.manual_seed(1)
    model = copy.deepcopy(dense)
    if form == DENSE:
        return model
    with torch.device(next(dense.parameters()).device):
        upcycle(model, delta=METHODS[form] if form in THIN else None)
        for layer in moe_layers(model).values():
            if isinstance(layer, VanillaMoE):
                perturb_(layer)
            elif isinstance(layer, SharedBaseMoE):
                fill_(layer)
        if form not in (VANILLA, *THIN):
            compress(model, dense, delta=METHODS[form])
    return model


def random_batch(model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
    """Random words, after an image where the model sees: what `model(**batch)` takes."""
    config, like = model.config, next(model.parameters())
    generator = torch.Generator().manual_seed(length)
    text = getattr(config, "text_config", config)
    ids_BS = torch.randint(5, text.vocab_size, (batch_size, length), generator=generator)
    if not hasattr(config, "vision_config"):
        return {"input_ids": ids_BS.to(like.device)}
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    ids_BS[:, :patches] = config.image_token_id
    pixels = torch.randn(batch_size, 3, vision.image_size, vision.image_size, generator=generator)
    return {"input_ids": ids_BS.to(like.device), "pixel_values": pixels.to(like)}


@dataclass
class Training:
    """A model in training: everything trains, AdamW, random data."""

    model: Any
    batch: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.model.train()
        set_trainable(self.model, "all")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def backward(self) -> None:
        loss = self.model(**self.batch, labels=self.batch["input_ids"]).loss
        for name, routing in take_routings(self.model).items():
            loss = loss + BALANCE * self.model.get_submodule(name).router.loss(routing)
        loss.backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_bytes(self) -> int:
        """Of weights, gradients, AdamW's moments and the model's buffers, as they are at the end of a step."""
        self.backward()
        self.optimizer.step()
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        gradients = [p.grad for p in self.trained if p.grad is not None]
        held = [*self.model.parameters(), *self.model.buffers(), *gradients, *moments]
        self.optimizer.zero_grad(set_to_none=True)
        return sum(tensor.nbytes for tensor in held)


class Generation:
    """Greedy generation in its two parts, over one key-value cache."""

    def __init__(self, model: Any, batch: dict[str, Tensor], num_tokens: int) -> None:
        self.model, self.batch, self.num_tokens = model.eval(), batch, num_tokens
        self.prefill()

    @torch.no_grad()
    def prefill(self) -> None:
        """The prompt: its keys and values, and the first new token."""
        output = self.model(**self.batch, use_cache=True)
        self.cache = output.past_key_values
        self.first_B1 = output.logits[:, -1:].argmax(-1)
        take_routings(self.model)

    @torch.no_grad()
    def decode(self) -> None:
        """`num_tokens` new tokens one after the other; the cache ends as it began."""
        token_B1 = self.first_B1
        for _ in range(self.num_tokens):
            output = self.model(input_ids=token_B1, past_key_values=self.cache, use_cache=True)
            token_B1 = output.logits[:, -1:].argmax(-1)
        self.cache.crop(-self.num_tokens)
        take_routings(self.model)


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
