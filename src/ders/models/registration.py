"""Lets transformers' own `from_pretrained` load a folder whose FFNs were replaced: no remote code, no new classes.

The `ders` section of a folder's `config.json` stands where transformers looks for a quantizer: the quantizer's hooks
replace the FFNs before the weights are loaded and check them afterwards. transformers itself only *reports* missing and
unexpected tensors; these hooks raise.
"""

import copy
import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ders.checkpoint import ModelFolderError, TensorFolder
from ders.deltas import Delta
from ders.upcycling import Upcycling, apply


class DersConfig(QuantizationConfigMixin):
    """The `ders` section of a `config.json`: an `Upcycling` as plain data, and `provenance`, which nothing acts on."""

    def __init__(self, **section: Any) -> None:
        self.quant_method = "ders"
        self.section = {key: value for key, value in section.items() if key != "quant_method"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": "ders", **copy.deepcopy(self.section)}

    def content_sha256(self) -> str | None:
        """Of the weights as they were written, where the folder says so."""
        found: str | None = (self.section.get("provenance") or {}).get("content_sha256")
        return found

    @property
    def upcycling(self) -> Upcycling:
        return Upcycling.from_section(self.section)


class DersQuantizer(HfQuantizer):
    """Swaps the FFNs in before the weights are loaded, and refuses a folder that does not hold exactly them."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        folder = model.name_or_path or model.config.name_or_path
        try:
            apply(model, self.quantization_config.upcycling)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ModelFolderError(f"{folder}: {error}") from error
        # `apply` wrote a fresh section; the folder's own one also holds its provenance.
        model.config.quantization_config = self.quantization_config
        files = [Path(file) for file in checkpoint_files or []]
        for file in files:
            if file.suffix != ".safetensors":
                raise ModelFolderError(f"{file}: a ders folder holds safetensors only")
        if not files:
            return
        tensors = TensorFolder(files[0].parent, files)
        found, expected = tensors.verify(), self.quantization_config.content_sha256()
        if found is not None and expected not in (None, found):
            raise ModelFolderError(
                f"{tensors.folder}: its shards are each whole, but not those of one model: together they have sha256 "
                f"{found[:16]}…, and config.json names {expected[:16]}…. Copy or compress it again"
            )
        _refuse_unexpected(model, tensors)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        missing = [
            name
            for name, tensor in model.state_dict(keep_vars=True).items()
            if not getattr(tensor, "_is_hf_initialized", False) and _must_be_in_files(model, name)
        ]
        if missing:
            raise ModelFolderError(
                f"{model.name_or_path}: lacks {len(missing)} tensors, among them {', '.join(missing[:3])}: the "
                "folder is incomplete, or not the model its config.json describes"
            )
        for module in model.modules():
            if isinstance(module, Delta):
                module.restore_()
        # What is saved from here on is another folder, perhaps after training.
        (self.quantization_config.section.get("provenance") or {}).pop("content_sha256", None)
        # This is an ordinary floating-point model from here on: let it be cast and trained like one.
        model.is_quantized = False
        for flag in ("quantization_method", "hf_quantizer"):
            if hasattr(model, flag):
                delattr(model, flag)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _whole(model: nn.Module) -> bool:
    """Whether this is the class the files were written from: then they hold its tensors and no others.

    A headless model, or one with another head, takes what it finds for its head.
    """
    return type(model).__name__ in (model.config.architectures or [])


def _must_be_in_files(model: nn.Module, name: str) -> bool:
    return _whole(model) or re.search(r"\.\d+\.", name) is not None


def _refuse_unexpected(model: nn.Module, tensors: TensorFolder) -> None:
    expected = {_tail(name) for name in model.state_dict()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    for file, names in tensors.names_in.items():
        unexpected = [
            name
            for name in names
            if _tail(name) not in expected
            and _must_be_in_files(model, name)
            and not any(re.search(pattern, name) for pattern in ignored)
        ]
        if unexpected:
            raise ModelFolderError(
                f"{file}: holds {len(unexpected)} tensors that its config.json does not describe, among them "
                f"{', '.join(unexpected[:3])}"
            )


def _tail(name: str) -> str:
    # A tensor bears another prefix in files than in memory where models are nested: compare without.
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model", "vision_model"))


def register() -> None:
    """Make `quant_method: ders` known to transformers; safe to call twice."""
    if "ders" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("ders")(DersConfig)
        register_quantizer("ders")(DersQuantizer)
