"""Whole neurons: each expert differs from the base in a few hidden neurons of its FFN, and in those wholly.

E experts, O/I out/in features, F hidden width of the FFN, N neurons of an expert, M rows or columns they take in a
matrix (N, or 2N where gate and up are one matrix), X features of the matrix's other side, S slots.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ders.deltas.base import Delta, Place
from ders.kernels import Neurons, block_columns, sample_positions, stable_hash
from ders.kernels.autocast import cast_for_matmul


class NeuronDelta(Delta):
    """Rows (of projections into the hidden width) or columns (of the one out of it) of N hidden neurons per expert.

    Not in arXiv 2503.01359. An expert's neurons are drawn without repetition and frozen; they follow from one stored
    64-bit seed per expert, which all matrices of its FFN share: what differs is then N neurons with all their weights,
    and a layer costs the dense FFN and E·N neurons more, whatever top_k is.

    Args:
        neurons: N, from 1 to F.
        hidden: which side of this matrix is the FFN's hidden one, `rows` or `columns`.
        blocks: how often that side holds all neurons: 2 where gate and up are one matrix (gate rows first).

    Raises:
        ValueError: neurons is out of range, or the rows are no whole number of blocks.
    """

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        *,
        neurons: int,
        hidden: str = "rows",
        blocks: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(num_experts, out_features, in_features, seed=seed)
        if hidden not in ("rows", "columns"):
            raise ValueError(f"hidden must be rows or columns: got {hidden!r}")
        side, other = (out_features, in_features) if hidden == "rows" else (in_features, out_features)
        if blocks < 1 or side % blocks:
            raise ValueError(f"blocks must divide the {side} {hidden} of the matrix: got {blocks}")
        self.width = side // blocks
        if not 1 <= neurons <= self.width:
            raise ValueError(f"neurons must be between 1 and {self.width}, the hidden width of the FFN: got {neurons}")
        self.neurons, self.hidden, self.blocks = neurons, hidden, blocks
        self.values_EMX = nn.Parameter(torch.zeros(num_experts, blocks * neurons, other))
        seeds = [stable_hash(seed, expert) for expert in range(num_experts)]
        self.register_buffer("seeds_E", torch.tensor(seeds, dtype=torch.int64))
        # Derived on first use; what they were drawn from tells without a look at them whether others are the same.
        self.register_buffer("neurons_EN", None, persistent=False)
        self.drawn_from: tuple[int, ...] = ()

    seeds_E: Tensor
    neurons_EN: Tensor | None

    @classmethod
    def at(cls, place: Place, num_experts: int, out_features: int, in_features: int, **dials: Any) -> "NeuronDelta":
        """Matrices of one FFN draw from one seed: they differ in the same neurons."""
        here = {"hidden": place.hidden, "blocks": place.blocks, "seed": place.ffn_seed}
        return cls(num_experts, out_features, in_features, **{**dials, **here})

    def restore_(self) -> None:
        self.neurons_EN = None

    @torch.compiler.assume_constant_result
    def _derive(self) -> Tensor:
        """Neurons (E, N), ascending."""
        if self.neurons_EN is None:
            with torch.inference_mode(False):  # they outlive the step that first asked for them
                seeds, device = self.seeds_E.tolist(), self.seeds_E.device
                drawn = [sample_positions(self.neurons, self.width, 1, seed, device) for seed in seeds]
                self.neurons_EN, self.drawn_from = torch.stack(drawn), (self.neurons, self.width, *seeds)
        return self.neurons_EN

    def _places(self, neurons_N: Tensor) -> Tensor:
        """Rows or columns (…, M) of neurons (…, N)."""
        return block_columns(neurons_N, self.blocks, self.width)

    def dense(self, expert: int) -> Tensor:
        values_MX = self.values_EMX[expert]
        empty = values_MX.new_zeros(self.blocks * self.width, values_MX.shape[1])
        filled = empty.index_put((self._places(self._derive()[expert]),), values_MX)
        return filled if self.hidden == "rows" else filled.T

    def forward(self, x_SI: Tensor, expert_S: Tensor) -> Tensor:
        x_SI, values_EMX = cast_for_matmul(x_SI, self.values_EMX)
        places_SM = self._places(self._derive())[expert_S]
        if self.hidden == "rows":
            z_SEM = F.linear(x_SI, values_EMX.flatten(0, 1)).unflatten(1, values_EMX.shape[:2])
            mine_SM = z_SEM.take_along_dim(expert_S[:, None, None], 1).squeeze(1)
            return mine_SM.new_zeros(len(x_SI), self.out_features).scatter_add(1, places_SM, mine_SM)
        mine_SE1 = F.one_hot(expert_S, self.num_experts).unsqueeze(2).to(x_SI.dtype)
        z_SEM = x_SI.gather(1, places_SM).unsqueeze(1) * mine_SE1
        return z_SEM.flatten(1) @ values_EMX.flatten(0, 1)

    def form(self) -> Neurons:
        return Neurons(self.values_EMX, self._derive(), self.drawn_from)

    @torch.no_grad()
    def fit_expert_(self, expert: int, delta_OI: Tensor) -> None:
        """Keeps what lies at its neurons: no choice of values there is closer."""
        by_neuron = delta_OI if self.hidden == "rows" else delta_OI.T
        self.values_EMX[expert] = by_neuron[self._places(self._derive()[expert])].to(self.values_EMX.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.neurons} neurons as {self.hidden}"
