"""EfficientNet-Lite0 as a vision tower: a small convolutional network with real ImageNet weights.

B batch, C channels, H/W height and width, P visual tokens (7×7 of a 224-pixel image), F features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# Repeats, kernel, stride of the first, expansion and output channels of each stage: table 1 of arXiv 1905.11946.
# Lite0 is B0 without squeeze-and-excitation, with ReLU6 for swish.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_CHANNELS, _EPS = 32, 1e-3
# The first maps are hundreds of times as large as what comes out: 30 MB an image of 224 pixels in fp32.
_IMAGES_AT_ONCE = 32


class EfficientNetLiteConfig(PreTrainedConfig):
    """What a LLaVA asks of a tower's configuration.

    `patch_size` is the side, in pixels, of what one visual token stands for: the product of all strides.
    """

    model_type = "efficientnet_lite"
    base_config_key = "vision_config"

    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    hidden_size: int = 1280


class _SamePadded(nn.Conv2d):
    """A convolution whose output is as large as its input divided by the stride, padded as TensorFlow does: where the
    padding is odd, the right and the bottom get more."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x_BCHW.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            needed = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [needed // 2, needed - needed // 2]
        return super().forward(F.pad(x_BCHW, pads) if any(pads) else x_BCHW)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        _SamePadded(inputs, outputs, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(outputs, eps=_EPS)
    )


class _InvertedBottleneck(nn.Module):
    """MobileNetV2's block (arXiv 1801.04381): widen, convolve every channel by itself, narrow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _convolution(inputs, wide, 1) if expansion > 1 else None
        self.depthwise = _convolution(wide, wide, kernel, stride, groups=wide)
        self.project = _convolution(wide, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        wide = x_BCHW if self.expand is None else F.relu6(self.expand(x_BCHW))
        narrow: Tensor = self.project(F.relu6(self.depthwise(wide)))
        return narrow + x_BCHW if self.residual else narrow


class EfficientNetLiteModel(PreTrainedModel):
    """The network up to its last feature map, whose pixels are the visual tokens.

    It stays in evaluation mode: batch normalisation uses the statistics it was trained with, whatever is fine-tuned.
    """

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet"
    main_input_name = "pixel_values"
    _no_split_modules = ("_InvertedBottleneck",)

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = _convolution(config.num_channels, _STEM_CHANNELS, 3, 2)
        blocks, channels = [], _STEM_CHANNELS
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for number in range(repeats):
                blocks.append(_InvertedBottleneck(channels, outputs, kernel, 1 if number else stride, expansion))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = _convolution(channels, config.hidden_size, 1)
        self.post_init()

    def train(self, mode: bool = True) -> "EfficientNetLiteModel":
        return super().train(False)

    def forward(self, pixel_values: Tensor, **ignored: Any) -> BaseModelOutput:
        """(B, C, H, W) → features (B, P, F), which are also the one hidden state."""
        # Without gradients a large batch (a thousand questions to be scored) need not be in memory at once.
        at_once = len(pixel_values) if torch.is_grad_enabled() else _IMAGES_AT_ONCE
        x_BPF = torch.cat([self._features(part) for part in pixel_values.split(at_once)])
        return BaseModelOutput(last_hidden_state=x_BPF, hidden_states=(x_BPF,))  # type: ignore[arg-type]

    def _features(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        else:
            # transformers' own knows which statistics came from a file and must stay.
            super()._init_weights(module)


def published_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of the published checkpoint, as this model's state dict; the classifier is left out."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("_fc."):
            continue
        *place, module, kind = name.split(".")
        part = _PARTS[module if place else f"top{module}"]
        renamed[".".join([*(["blocks", place[1]] if place else []), part, kind])] = tensor
    return renamed


# A convolution and its normalisation are a pair here. Normalisations are numbered in the published names.
_PARTS = {
    "top_conv_stem": "stem.0",
    "top_bn0": "stem.1",
    "top_conv_head": "head.0",
    "top_bn1": "head.1",
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}


def register() -> None:
    """Make `efficientnet_lite` known to transformers' automatic classes; safe to call twice."""
    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
