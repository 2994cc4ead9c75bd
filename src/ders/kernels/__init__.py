"""Fast tensor functions, each beside its slow oracle (floor 0: torch only)."""

from ders.kernels.distributed import from_first, global_sum
from ders.kernels.forms import Coded, Form, LowRank, Neurons, Sparse, entry_rows
from ders.kernels.grouped import grouped_linear, grouped_linear_oracle
from ders.kernels.mix import can_mix, can_mix_slots, mix_experts, mix_experts_oracle, mix_slots, name_activation
from ders.kernels.mix_op import ACTIVATIONS
from ders.kernels.native.library import cache_folder
from ders.kernels.neurons import block_columns, mix_neurons, mix_neurons_oracle
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
from ders.kernels.synthesis import synthesized_linear, synthesized_linear_oracle

__all__ = [
    "ACTIVATIONS",
    "SCHEMES",
    "Coded",
    "Form",
    "LowRank",
    "Neurons",
    "Sparse",
    "block_columns",
    "cache_folder",
    "can_mix",
    "can_mix_slots",
    "centred_grid",
    "dequantize",
    "entry_rows",
    "from_first",
    "global_sum",
    "grouped_linear",
    "grouped_linear_oracle",
    "largest_positions",
    "mix_experts",
    "mix_experts_oracle",
    "mix_neurons",
    "mix_neurons_oracle",
    "mix_slots",
    "name_activation",
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
    "synthesized_linear",
    "synthesized_linear_oracle",
    "unpack",
    "unpack_positions",
]
