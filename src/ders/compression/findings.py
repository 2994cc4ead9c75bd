"""What an analysis found, as data. E experts, F = E + 1: the base first, then the experts."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spectrum:
    """How much of each delta's squared norm its leading singular directions hold.

    Attributes:
        ranks: 1, 2, 4, …
        captured: per expert, one share per rank; None for a delta of zeros.
    """

    ranks: list[int]
    captured: list[list[float] | None]


@dataclass(frozen=True)
class MatrixFindings:
    """One projection of one MoE layer.

    Attributes:
        shape: (O, I).
        cosines: (F, F), symmetric.
        ratios: ‖W_e − W_base‖ / ‖W_base‖ per expert.
        kurtoses: of each delta's entries, 3 for a Gaussian; None where they are all alike.
        spectrum: None where it was not asked for.
        errors: relative reconstruction error per compression, one per expert; None where it was not measured.
    """

    shape: tuple[int, ...]
    cosines: list[list[float]]
    ratios: list[float]
    kurtoses: list[float | None]
    spectrum: Spectrum | None = None
    errors: dict[str, list[float]] | None = None

    @property
    def min_base_cosine(self) -> float:
        """The smallest cosine of the base and an expert."""
        return min(self.cosines[0][1:])

    @property
    def min_expert_cosine(self) -> float | None:
        """The smallest cosine of two experts; None for a single one."""
        return min((c for i, row in enumerate(self.cosines[1:], 1) for c in row[i + 1 :]), default=None)

    @property
    def max_kurtosis(self) -> float | None:
        return max((k for k in self.kurtoses if k is not None), default=None)


@dataclass(frozen=True)
class LayerFindings:
    index: int
    matrices: dict[str, MatrixFindings]


@dataclass(frozen=True)
class BaseChoice:
    """What the experts were compared with.

    Attributes:
        kind: `given` or `parent` (a dense model's folder), `shared` (the base in the file), or `mean` (of experts).
        folder: of a dense model.
    """

    kind: str
    folder: str | None = None

    def __str__(self) -> str:
        return {
            "given": f"the dense model in {self.folder}",
            "parent": f"the dense parent that the folder names, {self.folder}",
            "shared": "the shared base in the file, not the dense model it began as",
            "mean": "the mean of each layer's experts, for want of the dense model: cosines with it are higher, and "
            "mean less, than with the FFN the experts came from",
        }[self.kind]


@dataclass(frozen=True)
class Verdict:
    """Whether compression pays, in numbers and words.

    Attributes:
        upcycled: the experts come from this base; against their mean, they come from one and the same.
        sparsity, bits: the boldest that look safe; None where none does, or the question does not arise.
        smallest_cosine: of FFN and expert; of two experts where the base is their mean.
        largest_ratio: ‖delta‖ / ‖base‖.
        typical_kurtosis: the median over all deltas.
        sentences: the same in words, with the reasons.
    """

    upcycled: bool
    sparsity: float | None
    bits: int | None
    smallest_cosine: float
    largest_ratio: float
    typical_kurtosis: float | None
    sentences: list[str]


@dataclass(frozen=True)
class Analysis:
    """How a trained MoE's experts relate to the FFN they came from.

    Attributes:
        checkpoint: the folder.
        dtype: of its experts.
        delta: class of the deltas the file holds; None for full experts.
        universal: a dense FFN serves every token beside the experts.
    """

    checkpoint: str
    base: BaseChoice
    dtype: str
    num_experts: int
    top_k: int
    delta: str | None
    universal: bool
    layers: list[LayerFindings]
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)
