"""DeRS compression by quantisation: each expert differs from the base by a few bits per weight.

E experts, O/I out/in features, G groups of a matrix that share a grid, B bytes of a packed row, S slots.
"""

from typing import Any

import torch
from torch import Tensor

from ders.deltas.base import Delta
from ders.kernels import SCHEMES, Coded, centred_grid, dequantize, packed_size, quantize, quantized_linear

GRANULARITIES = ("tensor", "row", "group")


class QuantizedDelta(Delta):
    """Every weight of Δ_e as a code of `bits` bits on an evenly spaced grid (section 3.2 of arXiv 2503.01359).

    The paper does not name its scheme: `uniform` spans from the smallest to the largest weight (`symmetric`: ± the
    largest magnitude), `sign` is ± mean |Δ|. Rows of codes are packed to whole bytes; grids are kept in bf16.

    Args:
        bits: 1, 2, 3, 4 or 8.
        scheme: `uniform`, or `sign` with one bit.
        symmetric: `uniform` only; grids then need a step and no origin.
        granularity: one grid per `tensor`, per `row`, or per `group` of `group_size` columns of a row.

    Raises:
        ValueError: a dial is out of range, or two do not fit together.
    """

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        *,
        bits: int,
        scheme: str = "uniform",
        symmetric: bool = False,
        granularity: str = "row",
        group_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_experts, out_features, in_features, seed=seed)
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}: got {scheme!r}")
        if scheme == "sign" and bits != 1:
            raise ValueError(f"scheme=sign stores one bit per weight: set bits=1, or scheme=uniform (got bits={bits})")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}: got {granularity!r}")
        if (group_size is not None) != (granularity == "group"):
            raise ValueError(
                f"group_size belongs to granularity=group: got {group_size} with granularity={granularity}"
            )
        if group_size is not None and (group_size < 1 or in_features % group_size):
            raise ValueError(f"group_size must divide the {in_features} columns of the matrix: got {group_size}")
        self.bits, self.scheme, self.symmetric = bits, scheme, symmetric
        self.granularity, self.group_size = granularity, group_size
        groups = {"tensor": 1, "row": out_features}.get(granularity) or out_features * in_features // (group_size or 1)
        bytes_per_row = packed_size(in_features, bits)
        self.register_buffer("codes_EOB", torch.zeros(num_experts, out_features, bytes_per_row, dtype=torch.uint8))
        self.register_buffer("steps_EG", torch.zeros(num_experts, groups, dtype=torch.bfloat16))
        if not self.is_centred:
            self.register_buffer("lows_EG", torch.zeros(num_experts, groups, dtype=torch.bfloat16))

    codes_EOB: Tensor
    steps_EG: Tensor
    lows_EG: Tensor

    @property
    def is_centred(self) -> bool:
        """Whether grids lie evenly around zero, so that their origin follows from their step."""
        return self.symmetric or self.scheme == "sign"

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedDelta":
        # Codes were chosen against these very grids: no cast of the model rounds them, or widens the file.
        before = {name: grid for name, grid in self.named_buffers() if grid.is_floating_point()}
        super()._apply(fn, recurse)
        for name, grid in before.items():
            setattr(self, name, grid.to(getattr(self, name).device))
        return self

    def _grids(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        steps_EG = self.steps_EG.to(dtype)
        return centred_grid(steps_EG, self.bits) if self.is_centred else (self.lows_EG.to(dtype), steps_EG)

    def dense(self, expert: int) -> Tensor:
        lows_EG, steps_EG = self._grids(torch.float32)
        return dequantize(self.codes_EOB[expert], self.bits, self.in_features, lows_EG[expert], steps_EG[expert])

    def forward(self, x_SI: Tensor, expert_S: Tensor) -> Tensor:
        return quantized_linear(x_SI, expert_S, *self.form())

    def form(self) -> Coded:
        return Coded(self.codes_EOB, self.bits, *self._grids(torch.float32))

    @torch.no_grad()
    def fit_expert_(self, expert: int, delta_OI: Tensor) -> None:
        codes_OB, lows_G, steps_G = quantize(delta_OI, self.bits, self.steps_EG.shape[1], self.scheme, self.symmetric)
        self.codes_EOB[expert] = codes_OB
        self.steps_EG[expert] = steps_G
        if not self.is_centred:
            self.lows_EG[expert] = lows_G

    def coded_params(self) -> int:
        return self.num_experts * self.out_features * self.in_features * self.bits // 16

    def extra_repr(self) -> str:
        per = f"{self.granularity}" if self.group_size is None else f"{self.group_size} columns"
        return f"{super().extra_repr()}, {self.bits} bits, {self.scheme}, a grid per {per}"
