"""The one place where kinds of vision towers are named."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ders.models.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel


@dataclass(frozen=True)
class Tower:
    """What a LLaVA must know of its tower.

    Attributes:
        config, model: classes of transformers' kind.
        class_token: the first of its tokens stands for no place in the image, and a LLaVA leaves it out.
        image_processor: makes what turns pictures into pixel values of a given side.
    """

    config: Any
    model: Any
    class_token: bool
    image_processor: Callable[[int], Any]

    @property
    def select_strategy(self) -> str:
        """Which of its tokens a LLaVA takes, in that class's words."""
        return "default" if self.class_token else "full"


def _clip_processor(size: int) -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, resample=2)


def _efficientnet_processor(size: int) -> Any:
    # (x − 127) / 128, the network's own scaling.
    return CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=3,
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )


# Keyed by the `model_type` of a vision configuration.
TOWERS = {
    "clip_vision_model": Tower(CLIPVisionConfig, CLIPVisionModel, True, _clip_processor),
    "efficientnet_lite": Tower(EfficientNetLiteConfig, EfficientNetLiteModel, False, _efficientnet_processor),
}


def tower_of(vision: dict[str, Any]) -> Tower:
    """The row of a vision configuration's `model_type`; CLIP's where it names none.

    Raises:
        ValueError: there is none.
    """
    model_type = vision.get("model_type", "clip_vision_model")
    if model_type not in TOWERS:
        raise ValueError(
            f"unknown vision tower {model_type!r}. Known towers: {', '.join(TOWERS)}. A new one is one row in "
            "ders/models/towers.py"
        )
    return TOWERS[model_type]
