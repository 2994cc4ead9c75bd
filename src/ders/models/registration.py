"""Lets transformers' own `from_pretrained` load a folder whose FFNs were replaced: no remote code, no new classes.

The `ders` section of a folder's `config.json` stands where transformers looks for a quantizer: the quantizer's hooks
replace the FFNs before the weights are loaded and check them afterwards. transformers itself only *reports* missing and
unexpected tensors; these hooks raise.
"""

import copy
import re
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ders.deltas import Delta
from ders.moe import moe_layers
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

    @property
    def upcycling(self) -> Upcycling:
        return Upcycling.from_section(self.section)


class DersQuantizer(HfQuantizer):
    """Swaps the FFNs in before the weights are loaded, and refuses a folder that does not hold exactly them."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        apply(model, self.quantization_config.upcycling)
        # `apply` wrote a fresh section; the folder's own one also holds its provenance.
        model.config.quantization_config = self.quantization_config
        _refuse_unexpected(model, checkpoint_files or [])

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        missing = [
            f"{layer_name}.{name}"
            for layer_name, layer in moe_layers(model).items()
            for name, tensor in layer.state_dict(keep_vars=True).items()
            if not getattr(tensor, "_is_hf_initialized", False)
        ]
        if missing:
            raise ValueError(
                f"the folder lacks {len(missing)} tensors of the MoE layers, among them {', '.join(missing[:3])}: "
                "it is incomplete, or not the model its config.json describes"
            )
        for module in model.modules():
            if isinstance(module, Delta):
                module.restore_()
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


def _refuse_unexpected(model: nn.Module, files: list[str]) -> None:
    # Names in files may bear another prefix than in memory (LLaVA's do): compare from the layer list on.
    layers = moe_layers(model)
    expected = {".".join([*name.split(".")[-3:], key]) for name, layer in layers.items() for key in layer.state_dict()}
    ours = re.compile(r"(\w+\.\d+\.\w+\.(?:experts|router|universal)\..+)$")
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file}: a ders folder holds safetensors only")
        with safe_open(file, framework="pt") as tensors:
            unexpected = [key for key in tensors.keys() if (m := ours.search(key)) and m[1] not in expected]  # noqa: SIM118
        if unexpected:
            raise ValueError(
                f"{file}: holds {len(unexpected)} tensors that its config.json does not describe, among them "
                f"{', '.join(sorted(unexpected)[:3])}"
            )


def register() -> None:
    """Make `quant_method: ders` known to transformers; safe to call twice."""
    if "ders" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("ders")(DersConfig)
        register_quantizer("ders")(DersQuantizer)
