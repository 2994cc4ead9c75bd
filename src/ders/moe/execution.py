"""Which way experts over one shared base run: the base once per token, or each expert's weight built piece by piece.

`shared` does one product with the base per token and adds what the deltas give, so thin deltas cost what the dense FFN
costs. `synthesize` does K products per token, as vanilla experts do, with pieces of W + Δ_e that are built as they are
needed: for thick deltas and many tokens, applying W and Δ_e apart would cost more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ders.kernels import Coded, Form, LowRank, Sparse

EXECUTIONS = ("auto", "shared", "synthesize")


@dataclass(frozen=True)
class Costs:
    """What steps take on a kind of device, in multiply-adds of its large dense product.

    Attributes:
        read: reading a weight from memory.
        slot: moving one number of a slot's (token and choice) activations to and from memory.
        mix_entry: an entry of a sparse delta for a slot, in the pass that mixes the experts.
        entry: the same in a product of its own with many slots.
        code: a code for a slot.
        decode: a code, once for all slots of its expert.
        build: adding an entry or a code to a weight.
    """

    read: float
    slot: float
    mix_entry: float
    entry: float
    code: float
    decode: float
    build: float


# Measured in fp32 on layers of 2048×5632 and 576×1536 with 1 to 2048 tokens, two cores with AVX-512.
_CPU = Costs(read=17, slot=200, mix_entry=100, entry=3.5, code=3, decode=10, build=10)
# Arithmetic for an H200 in bf16 (4.3 TB/s, 790 TFLOP/s), not measured: weights are read by far more products' worth of
# time, and what is no matrix product is some ten times dearer.
_GPU = Costs(read=184, slot=370, mix_entry=400, entry=60, code=20, decode=25, build=25)
COSTS = {"cpu": _CPU, "cuda": _GPU}


@dataclass(frozen=True)
class Work:
    """What a layer is asked to do: T tokens with K of E experts each, by projections of (O, I), the output's last."""

    tokens: int
    top_k: int
    num_experts: int
    projections: Sequence[tuple[int, int]]

    @property
    def hit(self) -> float:
        """How many experts have a token, were each token's chosen evenly."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** self.tokens)

    @property
    def weights(self) -> int:
        return sum(o * i for o, i in self.projections)


def mixing_pays(work: Work, forms: Sequence[Form], costs: Costs = _CPU) -> bool:
    """Whether deltas are thin enough to be applied in the pass that mixes the experts, entry by entry."""
    return _mixed(work, forms, costs) <= _by_slots(work, forms, costs)


def synthesis_pays(work: Work, forms: Sequence[Form], costs: Costs = _CPU) -> bool:
    """Whether K products per token with weights built on the way are cheaper than one and the deltas."""
    shared = min(_mixed(work, forms, costs), _by_slots(work, forms, costs))
    slots, hit = work.tokens * work.top_k, work.hit
    built = sum(_entries(form, o * i) for form, (o, i) in zip(forms, work.projections, strict=True))
    moved = slots * costs.slot * sum(o for o, _ in work.projections)
    synthesized = work.weights * (slots + hit * costs.read) + hit * built * costs.build + moved
    return synthesized < work.weights * (work.tokens + costs.read) + shared


def _mixed(work: Work, forms: Sequence[Form], costs: Costs) -> float:
    """Beside the base, in the pass that mixes."""
    if all(isinstance(form, LowRank) for form in forms):
        return 0
    slots = work.tokens * work.top_k
    return slots * sum(costs.mix_entry * _entries(f, o * i) for f, (o, i) in zip(forms, work.projections, strict=True))


def _by_slots(work: Work, forms: Sequence[Form], costs: Costs) -> float:
    """Beside the base, each delta over all slots."""
    slots, total = work.tokens * work.top_k, 0.0
    for form, (o, i) in zip(forms, work.projections, strict=True):
        entries = _entries(form, o * i)
        once, each = (costs.decode, costs.code) if isinstance(form, Coded) else (costs.read, costs.entry)
        total += work.hit * entries * once + slots * (entries * each + o * costs.slot)
    return total


def _entries(form: Form, size: int) -> int:
    """How many numbers of a matrix a form holds by itself."""
    if isinstance(form, Sparse):
        return form.values_EN.shape[1]
    return size if isinstance(form, Coded) else 0
