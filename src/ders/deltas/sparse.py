"""DeRS-SM and DeRS compression by sparsification: each expert differs from the base at a few positions.

E experts, O/I out/in features, N kept entries of a matrix, P = O + 1 row boundaries, B packed bytes, S slots.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ders.deltas.base import Delta
from ders.kernels import (
    Sparse,
    dequantize,
    entry_rows,
    largest_positions,
    pack_positions,
    packed_size,
    positions_size,
    quantize,
    sample_positions,
    sparse_linear,
    stable_hash,
    unpack_positions,
)

SELECTIONS = ("random", "magnitude")
# Matrices with at most one entry in so many have the row of each entry at hand: 4 more bytes for each of few.
_THIN = 32


class SparseDelta(Delta):
    """Values at N = round((1 − sparsity)·O·I) positions per expert (sections 3.2 and 3.3 of arXiv 2503.01359).

    Random positions are distinct, uniform and frozen; they follow from one stored 64-bit seed per expert and cost no
    bytes. Positions chosen by magnitude are stored, as a bitmap or delta-coded, whichever is smaller. (The paper draws
    every position by itself, so its count varies; here it is exact.)

    Args:
        sparsity: fraction of zeros, in [0, 1).
        selection: which entries of a trained delta `fit_` keeps: `random` ones, or the largest by `magnitude`.
        rescale: `fit_` multiplies what it keeps by 1 / (1 − sparsity), so that the expected sum stays (eq. 4).
        values_bits: store values in as many bits (1, 2, 3, 4, 8) on a grid from an expert's smallest to its largest;
            they are then no longer trainable. None: as they are.

    Raises:
        ValueError: a dial is out of range, or sparsity so high that no entry of this matrix is kept.
    """

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        *,
        sparsity: float,
        selection: str = "random",
        rescale: bool = False,
        values_bits: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_experts, out_features, in_features, seed=seed)
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), the fraction of zeros: got {sparsity}")
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}: got {selection!r}")
        self.size = out_features * in_features
        self.sparsity, self.selection, self.rescale, self.values_bits = sparsity, selection, rescale, values_bits
        self.num_kept = round((1 - sparsity) * self.size)
        if self.num_kept == 0:
            raise ValueError(
                f"sparsity {sparsity} keeps none of the {self.size} entries of a {out_features}×{in_features} matrix: "
                f"set sparsity to {_largest_sparsity(self.size)} or less"
            )
        if self.size >= 2**31:
            raise ValueError(f"a {out_features}×{in_features} matrix has more entries than 32-bit indices can name")
        if values_bits is None:
            self.values_EN = nn.Parameter(torch.zeros(num_experts, self.num_kept))
        else:
            codes = torch.zeros(num_experts, packed_size(self.num_kept, values_bits), dtype=torch.uint8)
            self.register_buffer("codes_EB", codes)
            self.register_buffer("grids_E2", torch.zeros(num_experts, 2, dtype=torch.float32))
        if selection == "random":
            seeds = [stable_hash(seed, expert) for expert in range(num_experts)]
            self.register_buffer("seeds_E", torch.tensor(seeds, dtype=torch.int64))
        else:
            support = torch.zeros(num_experts, positions_size(self.num_kept, self.size), dtype=torch.uint8)
            self.register_buffer("support_EB", support)
            self.decided = "support_EB"
        # Derived on first use, so that loading a file costs no memory beyond the file's.
        self.register_buffer("columns_EN", None, persistent=False)
        self.register_buffer("row_starts_EP", None, persistent=False)
        self.register_buffer("rows_EN", None, persistent=False)

    seeds_E: Tensor
    support_EB: Tensor
    codes_EB: Tensor
    grids_E2: Tensor
    columns_EN: Tensor | None
    row_starts_EP: Tensor | None
    rows_EN: Tensor | None

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseDelta":
        before = self._buffers.get("grids_E2")
        super()._apply(fn, recurse)
        if before is not None:  # codes were chosen against this grid: no cast may round it
            self.grids_E2 = before.to(self.grids_E2.device)
        return self

    def restore_(self) -> None:
        self.columns_EN = self.row_starts_EP = self.rows_EN = None

    # A compiler takes what it finds here for a constant: the support never changes, and finding it reads the seeds.
    @torch.compiler.assume_constant_result
    def _derive(self) -> tuple[Tensor, Tensor]:
        """Columns (E, N) and row boundaries (E, P) of the compressed-row form, int32."""
        if self.columns_EN is None or self.row_starts_EP is None:
            columns, starts = [], []
            with torch.inference_mode(False):  # they outlive the step that first asked for them
                for expert in range(self.num_experts):
                    positions_N = self.positions(expert)
                    columns.append((positions_N % self.in_features).int())
                    boundaries_P = torch.arange(self.out_features + 1, device=positions_N.device) * self.in_features
                    starts.append(torch.searchsorted(positions_N, boundaries_P).int())
                self.columns_EN, self.row_starts_EP = torch.stack(columns), torch.stack(starts)
                if self.num_kept * _THIN <= self.size:
                    self.rows_EN = entry_rows(self.columns_EN, self.row_starts_EP)
        return self.columns_EN, self.row_starts_EP

    def positions(self, expert: int) -> Tensor:
        """Where one expert differs from the base: int64 (N,), row-major, ascending."""
        if self.selection == "magnitude":
            packed_B = self.support_EB[expert]
            if not packed_B.any():  # nothing chosen yet: any positions will do
                return torch.arange(self.num_kept, device=packed_B.device)
            return unpack_positions(packed_B, self.num_kept, self.size)
        seed = int(self.seeds_E[expert])
        return sample_positions(self.num_kept, self.out_features, self.in_features, seed, self.seeds_E.device)

    def place_expert_(self, expert: int, positions_N: Tensor) -> None:
        """Store other positions (N,), ascending, of an expert whose positions are stored; its values stay in order."""
        self.support_EB[expert] = pack_positions(positions_N, self.size)
        self.restore_()

    def _values(self, dtype: torch.dtype) -> Tensor:
        if self.values_bits is None:
            return self.values_EN
        lows_E, steps_E = self.grids_E2.unbind(1)
        return dequantize(self.codes_EB, self.values_bits, self.num_kept, lows_E, steps_E).to(dtype)

    def dense(self, expert: int) -> Tensor:
        values_N = self._values(torch.float32)[expert]
        flat = values_N.new_zeros(self.size).index_put((self.positions(expert),), values_N)
        return flat.view(self.out_features, self.in_features)

    def forward(self, x_SI: Tensor, expert_S: Tensor) -> Tensor:
        return sparse_linear(x_SI, expert_S, self._values(x_SI.dtype), *self._derive())

    def form(self) -> Sparse:
        columns_EN, row_starts_EP = self._derive()
        return Sparse(self._values(torch.float32), columns_EN, row_starts_EP, self.rows_EN)

    @torch.no_grad()
    def fit_expert_(self, expert: int, delta_OI: Tensor) -> None:
        """Keeps what `selection` says; without `rescale` no choice of values on that support is closer."""
        if self.selection == "magnitude":
            positions_N = largest_positions(delta_OI, self.num_kept)
            self.place_expert_(expert, positions_N)
        else:
            positions_N = self.positions(expert)
        values_N = delta_OI.reshape(-1)[positions_N]
        if self.rescale:
            values_N = values_N / (1 - self.sparsity)
        if self.values_bits is None:
            self.values_EN[expert] = values_N.to(self.values_EN.dtype)
        else:
            codes_1B, low_1, step_1 = quantize(values_N[None], self.values_bits, 1, "uniform", False)
            self.codes_EB[expert] = codes_1B[0]
            self.grids_E2[expert] = torch.cat([low_1, step_1]).float()

    def coded_params(self) -> int:
        return self.num_experts * self.num_kept * (self.values_bits or 0) // 16

    def extra_repr(self) -> str:
        kept = f"{self.num_kept} kept per matrix"
        return f"{super().extra_repr()}, sparsity={self.sparsity}, {self.selection}, {kept}"


def _largest_sparsity(size: int) -> float:
    """1 − 1/size, rounded down to a number short enough to type."""
    digits = 10 ** (len(str(size)) + 1)
    return math.floor((1 - 1 / size) * digits) / digits
