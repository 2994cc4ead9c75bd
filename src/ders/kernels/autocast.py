"""What `torch.autocast` does for `linear`, for operations it does not know."""

import torch
from torch import Tensor


def cast_for_matmul(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The operands in the autocast dtype where autocast is on, else the weights in the dtype of `x`."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return x.to(dtype), *(w.to(dtype) for w in weights)
