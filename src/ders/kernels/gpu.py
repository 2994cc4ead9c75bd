"""Whether the kernels for a GPU can run here."""

import functools
import importlib.util

import torch


@torch.compiler.assume_constant_result
@functools.cache
def triton_available() -> bool:
    """Whether Triton is installed: torch's CUDA builds bring it along."""
    return importlib.util.find_spec("triton") is not None
