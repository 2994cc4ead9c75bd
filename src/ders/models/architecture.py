"""The paper's architectures: their shapes at every scale, and their real parts where these are loaded."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from ders.models import qwen1
from ders.models.bundle import IMAGE_TOKEN, ModelBundle
from ders.models.llava import assemble_llava
from ders.models.packaged import local_source
from ders.models.tiny import TinyLlava, TinyLM

log = logging.getLogger(__name__)

T = TypeVar("T")

# Entries that decide the shapes of weights; the others may differ between a model and its descendants.
_SHAPES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "use_qkv_bias",
    "tie_word_embeddings",
    "image_size",
    "patch_size",
)


@dataclass(kw_only=True)
class _Pretrained:
    """What the architectures add to the small models: parts from a folder, the Hub, or a package (`package:NAME`).

    Attributes:
        name: the architecture's name, as in `model=…`.
        llm: the language model.
        tokenizer: where its tokenizer is; None: `llm`.
        pretrained: False: random weights and a vocabulary of the data's words, as a tiny model has.
        sizes: values of the dial `scale` that it has shapes for.
    """

    name: str
    llm: str
    tokenizer: str | None = None
    pretrained: bool = False
    sizes: tuple[str, ...] = ("tiny", "paper")

    def build(self, texts: Iterable[str]) -> ModelBundle:
        """The model and what it reads through; float32.

        Raises:
            ValueError: `pretrained`, and a part cannot be read, or has other shapes than this architecture.
        """
        if not self.pretrained:
            return super().build(texts)  # type: ignore[misc]
        self.verify()
        return self._load()

    def verify(self) -> None:
        """Compare the configurations of the parts, if `pretrained`, with this architecture's shapes; no weight is read.

        Raises:
            ValueError: a part cannot be read, or differs in a shape; every such shape is named.
        """
        if self.pretrained:
            _, config = _language_config(self.llm)
            self._compare(f"model.llm={self.llm}", config, self.text)

    def _compare(self, what: str, found: Any, shapes: dict[str, Any]) -> None:
        wrong = [
            f"{key} is {getattr(found, key, None)}, model={self.name} has {shapes[key]}"
            for key in _SHAPES
            if shapes.get(key) is not None and getattr(found, key, None) != shapes[key]
        ]
        if wrong:
            raise ValueError(f"{what}: {'; '.join(wrong)}. Name another folder, or set these shapes")

    def _load(self) -> ModelBundle:
        raise NotImplementedError

    def _load_language(self) -> Any:
        raw, _ = _language_config(self.llm)
        if raw["model_type"] != qwen1.MODEL_TYPE:
            return _weights(AutoModelForCausalLM, "model.llm", self.llm)
        folder = Path(self.llm)
        if not folder.is_dir():
            folder = _read("model.llm", self.llm, lambda: Path(snapshot_download(self.llm, allow_patterns=_FILES)))
        return qwen1.load_qwen1(folder, raw, torch.float32)

    def _load_tokenizer(self) -> Any:
        source, vocab_size = self.tokenizer or self.llm, _language_config(self.llm)[1].vocab_size
        tokenizer = _read(
            "model.tokenizer",
            source,
            lambda: AutoTokenizer.from_pretrained(local_source(source), trust_remote_code=False),
        )
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"model.tokenizer={source}: has {len(tokenizer)} tokens, and model.llm={self.llm} has {vocab_size}: "
                "name the tokenizer of this model"
            )
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError(f"model.tokenizer={source}: has neither a pad nor an end-of-sequence token")
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token serves
        return tokenizer


@dataclass(kw_only=True)
class LanguageArchitecture(_Pretrained, TinyLM):
    """A language model alone (the paper's Coder)."""

    def _load(self) -> ModelBundle:
        tokenizer = self._load_tokenizer()  # the small parts first: what is missing shows early
        return ModelBundle(self._load_language(), tokenizer)


@dataclass(kw_only=True)
class LlavaArchitecture(_Pretrained, TinyLlava):
    """A LLaVA of a vision tower, a fresh projector (mlp2x_gelu) and a language model.

    Attributes:
        vision_tower: the tower.
        pad_images: images become square by a border of the mean colour (LLaVA's `image_aspect_ratio=pad`); False:
            they are cropped.
    """

    vision_tower: str
    pad_images: bool = True

    def verify(self) -> None:
        super().verify()
        if self.pretrained:
            source = self.vision_tower
            kind = self._tower.config
            config = _read("model.vision_tower", source, lambda: kind.from_pretrained(local_source(source)))
            self._compare(f"model.vision_tower={source}", config, self.vision)

    def _load(self) -> ModelBundle:
        tokenizer, images = self._load_tokenizer(), self._image_processor()
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        language = self._load_language()
        tower = _weights(self._tower.model, "model.vision_tower", self.vision_tower)
        vocab_size = language.config.vocab_size
        model = assemble_llava(
            language,
            tower,
            image_token=image_token,
            feature_layer=self.feature_layer,
            select_strategy=self._tower.select_strategy,
        )
        if image_token >= vocab_size:
            log.info("%s has no spare row for %s: %d rows -> %d", self.llm, IMAGE_TOKEN, vocab_size, len(tokenizer))
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return ModelBundle(model, self._processor(tokenizer, images))

    def _image_processor(self) -> Any:
        kind = LlavaImageProcessorPil if self.pad_images else CLIPImageProcessorPil
        options = {"do_pad": True} if self.pad_images else {}
        if self.pretrained:
            source = self.vision_tower
            return _read("model.vision_tower", source, lambda: kind.from_pretrained(local_source(source), **options))
        return kind.from_dict(super()._image_processor().to_dict() | options)


_FILES = ["*.json", "*.safetensors"]


def _language_config(source: str) -> tuple[dict[str, Any], Any]:
    """`config.json` of a language model as it is, and as transformers reads it."""

    def read() -> tuple[dict[str, Any], Any]:
        folder = local_source(source)
        raw, _ = PreTrainedConfig.get_config_dict(folder)
        if raw.get("model_type") == qwen1.MODEL_TYPE:
            return raw, qwen1.qwen2_config(raw)
        return raw, AutoConfig.from_pretrained(folder, trust_remote_code=False)

    return _read("model.llm", source, read)


def _read(key: str, source: str, reader: Callable[[], T]) -> T:
    """What the reader returns.

    Raises:
        ValueError: it fails for want of a file.
    """
    try:
        return reader()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{key}={source}: no such folder, or the Hugging Face Hub is out of reach ({reason}). Download the model "
            f"and say {key}=DIR"
        ) from error


def _weights(kind: Any, key: str, source: str) -> Any:
    # A pickle, the only form of some older models, is read as tensors alone: `weights_only`.
    model, report = _read(
        key,
        source,
        lambda: kind.from_pretrained(
            local_source(source),
            dtype=torch.float32,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
        ),
    )
    if report["missing_keys"]:
        raise ValueError(f"{key}={source}: lacks the weights of {sorted(report['missing_keys'])[:3]}")
    return model
