"""One weight matrix per group of rows.

S slots sorted by expert, E experts, O/I out/in features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ders.kernels.autocast import cast_for_matmul


def grouped_linear_oracle(x_SI: Tensor, counts_E: Tensor, weight_EOI: Tensor) -> Tensor:
    """Row by row: y_s = W_{e(s)} x_s."""
    expert_S = torch.repeat_interleave(torch.arange(len(weight_EOI), device=x_SI.device), counts_E)
    return torch.einsum("soi,si->so", weight_EOI[expert_S], x_SI)


def grouped_linear(x_SI: Tensor, counts_E: Tensor, weight_EOI: Tensor) -> Tensor:
    """y (S, O) with y_s = W_{e(s)} x_s, where the first counts_E[0] rows belong to expert 0, the next to expert 1, …

    Torch's grouped product where it accepts the operands (not float64, rows of a multiple of 16 bytes), else one
    product an expert.
    """
    x_SI, weight_EOI = cast_for_matmul(x_SI, weight_EOI)
    out_features, in_features = weight_EOI.shape[1:]
    aligned = all(n * x_SI.element_size() % 16 == 0 for n in (out_features, in_features))
    if aligned and len(x_SI) and x_SI.dtype in (torch.float32, torch.bfloat16, torch.float16):
        ends_E = counts_E.cumsum(0).to(torch.int32)
        return F.grouped_mm(x_SI.contiguous(), weight_EOI.transpose(1, 2), offs=ends_E)
    groups = zip(x_SI.split(counts_E.tolist()), weight_EOI, strict=True)
    return torch.cat([x @ w.T for x, w in groups])
