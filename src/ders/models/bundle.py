"""A model with what it reads through, and its Hugging Face folder."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from ders.checkpoint import ModelFolderError, TensorFolder, new_folder
from ders.models.registration import DersConfig
from ders.models.towers import TOWERS

IMAGE_TOKEN = "<image>"


@dataclass
class ModelBundle:
    """A model and its processor (with a vision tower) or tokenizer (without one)."""

    model: nn.Module
    processor: Any

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def image_processor(self) -> Any | None:
        return getattr(self.processor, "image_processor", None)

    @property
    def image_tokens(self) -> int:
        """Visual tokens of one image; 0 for a text model."""
        config = self.model.config
        if self.image_processor is None:
            return 0
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        tower = TOWERS.get(config.vision_config.model_type)
        class_token = tower is None or tower.class_token
        # The default strategy leaves out the tower's class token.
        return patches + (class_token and config.vision_feature_select_strategy == "full")

    @property
    def pixel_reader(self) -> Callable[[Image], Tensor] | None:
        """Picture → pixel values (C, H, W); None for a text model."""
        if self.image_processor is None:
            return None
        return functools.partial(_pixels, self.image_processor)


def _pixels(image_processor: Any, image: Image) -> Tensor:
    values: Tensor = image_processor(images=image, return_tensors="pt")["pixel_values"][0]
    return values


def save_bundle(
    bundle: ModelBundle,
    folder: Path,
    provenance: dict[str, Any] | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a whole Hugging Face folder; it appears complete or not at all, and replaces an older one.

    Args:
        provenance: noted in the `ders` section of an upcycled model's `config.json`; nothing ever acts on it.
        state_dict: the weights, where the model itself holds only pieces of them.
    """
    section = getattr(bundle.model.config, "quantization_config", None)
    if section is not None:
        data = section.to_dict() if isinstance(section, DersConfig) else dict(section)
        bundle.model.config.quantization_config = DersConfig(
            **data | ({"provenance": provenance} if provenance else {})
        )
    with new_folder(folder, overwrite=True) as unfinished:
        bundle.model.save_pretrained(unfinished, state_dict=state_dict)
        bundle.processor.save_pretrained(unfinished)


def read_config(folder: Path) -> Any:
    """The configuration of a model folder, before any weight is read.

    Raises:
        ModelFolderError: no such folder, or no readable `config.json` or weights in it.
    """
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such folder. Give the path of a Hugging Face model folder")
    try:
        json.loads((folder / "config.json").read_text())
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFolderError(f"{folder}: config.json is missing or unreadable: {error}") from error
    if not any(folder.glob("*.safetensors")):
        raise ModelFolderError(f"{folder}: holds no safetensors weights")
    return config


def load_bundle(folder: Path, dtype: torch.dtype | str = "auto") -> ModelBundle:
    """Load a model folder, dense or upcycled, with its processor.

    Raises:
        ModelFolderError: the folder is missing, incomplete or corrupt.
    """
    config = read_config(folder)
    auto_model = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    try:
        # Weights in safetensors only, and no code from the folder.
        model, report = auto_model.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except ModelFolderError:
        raise
    except Exception as error:  # safetensors, json and torch each raise their own on a damaged file
        raise ModelFolderError(f"{folder}: cannot be loaded: {error}") from error
    bundle = ModelBundle(model, _processor(folder, config))
    lost = [f"{what} {sorted(report[what])[:3]}" for what in ("missing_keys", "unexpected_keys") if report[what]]
    if lost:
        raise ModelFolderError(f"{folder}: the weights do not fit config.json: {'; '.join(lost)}")
    return bundle


def dense_from_config(config: Any, device: str = "meta") -> nn.Module:
    """A model of a configuration's class; on the meta device, as by default, its shapes alone."""
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device(device):
        model: nn.Module = auto.from_config(config)
    return model


def outline_bundle(folder: Path) -> ModelBundle:
    """A dense model folder's shapes, on the meta device, with its processor.

    Raises:
        ModelFolderError: the folder is missing, or cannot be read.
    """
    config = read_config(folder)
    return ModelBundle(dense_from_config(config), _processor(folder, config))


def _processor(folder: Path, config: Any) -> Any:
    kind = AutoProcessor if hasattr(config, "vision_config") else AutoTokenizer
    try:
        processor = kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelFolderError(f"{folder}: its processor cannot be loaded: {error}") from error
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelFolderError(f"{folder}: its tokenizer has neither a pad token nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token serves
    return processor


def weights_sha256(folder: Path) -> str:
    """sha256 of the weights of a model folder by content, however they are sharded."""
    return TensorFolder(folder).content_sha256()


def stored_bytes(folder: Path) -> int:
    """Bytes of the weight files of a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
