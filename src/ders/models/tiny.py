"""Small models of real classes, built from nothing: the same path as a real run, in seconds."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ders.models.bundle import IMAGE_TOKEN, ModelBundle
from ders.models.towers import Tower, tower_of
from ders.upcycling import require_family

_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN]


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, numbers and signs, with every word of the texts and of the prompt."""
    pre = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words = {"USER", "ASSISTANT", ":"}
    for text in texts:
        words.update(piece for piece, _ in pre.pre_tokenize_str(text.replace(IMAGE_TOKEN, " ")))
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[IMAGE_TOKEN],
    )


@dataclass(kw_only=True)
class TinyLM:
    """A small language model of any family, with a vocabulary made from the data's words.

    Attributes:
        text: entries of a Hugging Face text configuration, `model_type` among them. A `vocab_size` in it is kept,
            whatever the data's words are.
        sizes: values of the dial `scale` that the model has shapes for.
    """

    text: dict[str, Any]

    has_images = False
    sizes: ClassVar[tuple[str, ...]] = ("tiny",)

    def dense(self, vocab_size: int = 256) -> nn.Module:
        """The model with random weights; under `torch.device("meta")` its shapes alone."""
        return AutoModelForCausalLM.from_config(self._text_config(vocab_size))

    def verify(self) -> None:
        """Check the parts that `build` would load, without their weights; there are none here."""

    def build(self, texts: Iterable[str]) -> ModelBundle:
        """The model with random weights (torch's generator) and its tokenizer."""
        tokenizer = self._word_tokenizer(texts)
        return ModelBundle(self.dense(len(tokenizer)), tokenizer)

    def _word_tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        tokenizer, limit = word_tokenizer(texts), self.text.get("vocab_size")
        if limit is not None and len(tokenizer) > limit:
            raise ValueError(f"the data has {len(tokenizer)} words and signs: set model.text.vocab_size, now {limit}")
        return tokenizer

    def _text_config(self, vocab_size: int) -> Any:
        require_family(self.text["model_type"])
        given = {key: value for key, value in self.text.items() if key != "vocab_size" or value is not None}
        return AutoConfig.for_model(
            **{"vocab_size": vocab_size} | given,
            pad_token_id=_SPECIAL.index("<pad>"),
            bos_token_id=_SPECIAL.index("<s>"),
            eos_token_id=_SPECIAL.index("</s>"),
        )


@dataclass(kw_only=True)
class TinyLlava(TinyLM):
    """A small LLaVA: vision tower, two-layer projector, language model.

    Attributes:
        vision: entries of a vision configuration, image and patch size among them; `model_type` says of which tower,
            and is CLIP's if left out.
        feature_layer: which hidden layer of the tower the projector reads; LLaVA's is −2.
    """

    vision: dict[str, Any] = field(default_factory=dict)
    feature_layer: int = -2

    has_images = True

    def dense(self, vocab_size: int = 256) -> nn.Module:
        missing = [key for key in ("image_size", "patch_size") if not self.vision.get(key)]
        if missing:
            raise ValueError(
                f"this model has a vision tower, and the data offers no {' and no '.join(missing)}: set "
                f"{' '.join(f'data.{key}=…' for key in missing)}, choose data with images, or a text model"
            )
        config = LlavaConfig(
            vision_config=self._tower.config(**self.vision),
            text_config=self._text_config(vocab_size),
            image_token_index=_SPECIAL.index(IMAGE_TOKEN),
            vision_feature_layer=self.feature_layer,
            vision_feature_select_strategy=self._tower.select_strategy,
        )
        return LlavaForConditionalGeneration(config)

    def build(self, texts: Iterable[str]) -> ModelBundle:
        tokenizer = self._word_tokenizer(texts)
        return ModelBundle(self.dense(len(tokenizer)), self._processor(tokenizer, self._image_processor()))

    @property
    def _tower(self) -> Tower:
        return tower_of(self.vision)

    def _image_processor(self) -> Any:
        return self._tower.image_processor(self.vision["image_size"])

    def _processor(self, tokenizer: Any, images: Any) -> LlavaProcessor:
        return LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=self.vision["patch_size"],
            vision_feature_select_strategy=self._tower.select_strategy,
            num_additional_image_tokens=int(self._tower.class_token),
        )
