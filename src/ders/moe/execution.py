"""Which way experts over one shared base run: the base once per token, or each expert's weight built piece by piece.

`shared` does one product with the base per token and adds what the deltas give, so thin deltas cost what the dense FFN
costs. `synthesize` does K products per token, as vanilla experts do, with pieces of W + Δ_e that are built as they are
needed: for thick deltas and many tokens applying W and Δ_e apart would do (1 + K).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ders.kernels import Coded, Form, LowRank, Sparse

EXECUTIONS = ("auto", "shared", "synthesize")


@dataclass(frozen=True)
class Costs:
    """What steps take on a device, in multiply-adds of its large dense product.

    Attributes:
        read: reading one weight from memory: a product with fewer tokens than this is bound by it.
        mix_entry: one entry of a thin sparse delta for one slot.
        lane_entry, lane_slots: one entry of a thicker one for up to `lane_slots` slots.
        mix_rank: one element of a low-rank factor for one slot.
        decode, code_slot: one code once, and its product with one slot.
        build_entry, build_code, build_rank: adding an entry, a code, or one rank's share of a weight to a weight.
    """

    read: float
    mix_entry: float
    lane_entry: float
    lane_slots: int
    mix_rank: float
    decode: float
    code_slot: float
    build_entry: float
    build_code: float
    build_rank: float
