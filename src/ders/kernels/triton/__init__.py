"""Kernels for a GPU. Import this only where Triton is installed and tensors are on a GPU (or TRITON_INTERPRET=1).

Plain functions of tensors: what differentiates them stands beside their slower counterparts. None waits for the
device, none adds atomically: results do not vary from run to run, and CUDA graphs can hold them.
"""

from ders.kernels.triton.low_rank import mix_low_rank, mix_low_rank_backward
from ders.kernels.triton.quantized import quantized_matvec
from ders.kernels.triton.sparse_matvec import sparse_matvec
from ders.kernels.triton.sparse_mix import Transposed, mix_sparse, mix_sparse_backward, transpose_entries
from ders.kernels.triton.synthesis import (
    synthesized_quantized,
    synthesized_quantized_backward,
    synthesized_sparse,
    synthesized_sparse_backward,
)

__all__ = [
    "Transposed",
    "mix_low_rank",
    "mix_low_rank_backward",
    "mix_sparse",
    "mix_sparse_backward",
    "quantized_matvec",
    "sparse_matvec",
    "synthesized_quantized",
    "synthesized_quantized_backward",
    "synthesized_sparse",
    "synthesized_sparse_backward",
    "transpose_entries",
]
