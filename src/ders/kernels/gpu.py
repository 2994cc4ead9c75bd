"""Whether the kernels for a GPU can run here."""

import functools
import importlib.util

import torch
from torch import Tensor

from ders.kernels.forms import Coded


@torch.compiler.assume_constant_result
@functools.cache
def triton_available() -> bool:
    """Whether Triton is installed: torch's CUDA builds bring it along."""
    return importlib.util.find_spec("triton") is not None


def on_gpu(x: Tensor) -> bool:
    """Whether these kernels take a tensor: they know no float64."""
    return x.is_cuda and x.dtype != torch.float64 and triton_available()


def takes_codes(form: Coded) -> bool:
    """Whether they know such codes: each group of columns that shares a grid must fill whole bytes."""
    (_, out_features, row_bytes), groups = form.codes_EOB.shape, form.lows_EG.shape[1]
    return form.bits in (1, 2, 4) and (groups <= out_features or row_bytes % (groups // out_features) == 0)
