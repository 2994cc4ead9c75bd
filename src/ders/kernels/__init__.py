"""Fast tensor functions, each beside its slow oracle (floor 0: torch only)."""

from ders.kernels.distributed import global_sum
from ders.kernels.grouped import grouped_linear, grouped_linear_oracle
from ders.kernels.packing import pack, pack_positions, packed_size, positions_size, unpack, unpack_positions
from ders.kernels.quantization import (
    SCHEMES,
    centred_grid,
    dequantize,
    quantize,
    quantized_linear,
    quantized_linear_oracle,
    row_blocks,
)
from ders.kernels.sampling import largest_positions, sample_positions, stable_hash
from ders.kernels.sparse import sparse_linear, sparse_linear_oracle

__all__ = [
    "SCHEMES",
    "centred_grid",
    "dequantize",
    "global_sum",
    "grouped_linear",
    "grouped_linear_oracle",
    "largest_positions",
    "pack",
    "pack_positions",
    "packed_size",
    "positions_size",
    "quantize",
    "quantized_linear",
    "quantized_linear_oracle",
    "row_blocks",
    "sample_positions",
    "sparse_linear",
    "sparse_linear_oracle",
    "stable_hash",
    "unpack",
    "unpack_positions",
]
