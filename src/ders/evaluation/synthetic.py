"""Model folders of real shapes and random weights, written tensor by tensor: something to measure on."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ders.checkpoint import FolderWriter, Slot, TensorFolder, new_folder, write_config
from ders.upcycling import upcycle

STABLELM_2_1_6B = {
    "model_type": "stablelm",
    "vocab_size": 100352,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "use_qkv_bias": True,
    "partial_rotary_factor": 0.25,
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
}
# Of a weight's own standard deviation: what a low learning rate and one epoch leave, cosine 0.9998.
DELTA_SCALE = 0.02


def write_pair(shapes: dict[str, Any], parent: Path, vanilla: Path) -> None:
    """A dense model and a vanilla MoE upcycled from it (every other layer, 4 experts), both bf16.

    Expert weights are the parent's plus small normal noise; everything else is equal.
    """
    config = AutoConfig.for_model(**shapes, dtype="bfloat16")
    config.architectures = [type(_meta(config)).__name__]
    dense = _meta(config)
    weights = dict(dense.state_dict())
    generator = torch.Generator().manual_seed(0)
    with new_folder(parent) as folder:
        with FolderWriter(folder, _slots(weights)) as writer:
            for name, tensor in weights.items():
                writer.write(name, _draw(tensor.shape, generator))
            parent_sha256 = writer.close()
        write_config(folder, config.to_dict())
    model = _meta(config)
    upcycle(model)
    section = model.config.quantization_config
    provenance = {"parent": str(parent.resolve()), "parent_sha256": parent_sha256}
    with new_folder(vanilla) as folder:
        with FolderWriter(folder, _slots(model.state_dict())) as writer:
            _write_moe(model.state_dict(), parent, writer, generator)
            writer.close()
        write_config(folder, config.to_dict() | {"quantization_config": {**section, "provenance": provenance}})


def _write_moe(
    tensors: dict[str, torch.Tensor], parent: Path, writer: FolderWriter, generator: torch.Generator
) -> None:
    dense = TensorFolder(parent).pieces
    for name, tensor in tensors.items():
        if ".experts.weights_EOI." in name:
            layer, projection = name.split(".experts.weights_EOI.")
            base = dense[f"{layer}.{projection}.weight"].read().float()
            for _ in range(len(tensor)):
                noise = _draw(base.shape, generator).float()
                writer.write(name, noise.mul_(DELTA_SCALE).add_(base).bfloat16())
        elif name in dense:
            writer.write(name, dense[name].read())
        else:
            writer.write(name, _draw(tensor.shape, generator).to(tensor.dtype))


def _meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def _slots(tensors: dict[str, torch.Tensor]) -> list[Slot]:
    return [Slot(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def _draw(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape).normal_(std=0.02, generator=generator).bfloat16()
