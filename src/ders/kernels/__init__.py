"""Fast tensor functions, each beside its slow oracle (floor 0: torch only)."""

from ders.kernels.distributed import global_sum
from ders.kernels.grouped import grouped_linear, grouped_linear_oracle
from ders.kernels.sampling import sample_positions, stable_hash
from ders.kernels.sparse import sparse_linear, sparse_linear_oracle

__all__ = [
    "global_sum",
    "grouped_linear",
    "grouped_linear_oracle",
    "sample_positions",
    "sparse_linear",
    "sparse_linear_oracle",
    "stable_hash",
]
