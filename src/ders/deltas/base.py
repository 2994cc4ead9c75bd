"""The contract of a delta: everything the other floors may ask of one.

S slots (a token and one of its choices), E experts, O/I out/in features.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ders.kernels import Form, Neurons


@dataclass(frozen=True)
class Place:
    """Where in a model the matrix of a delta stands.

    Attributes:
        seed: of this matrix; two matrices never share one.
        ffn_seed: of all matrices of its FFN.
        hidden: which side of it is the FFN's hidden one, `rows` or `columns`.
        blocks: how often that side holds all hidden neurons: 2 where gate and up are one matrix, gate first.
        layer, num_layers: its FFN is the layer-th, from 0 on, of so many that were replaced.
    """

    seed: int
    ffn_seed: int
    hidden: str
    blocks: int
    layer: int
    num_layers: int


class Delta(nn.Module):
    """What E experts add to one base weight: W_e = W_base + Δ_e (eq. 2 of arXiv 2503.01359).

    A delta is born zero, so a freshly upcycled expert is exactly its base. A subclass states its own dials as keyword
    arguments and passes shape and seed on; defining it registers it under its class name, by which files refer to it.

    Args:
        num_experts: E.
        out_features: O, rows of the base weight.
        in_features: I, columns of the base weight.
        seed: decides everything random about this delta; two matrices never share one.
    """

    known: ClassVar[dict[str, type["Delta"]]] = {}
    # The buffer that is decided while a stage runs, where there is one: a checkpoint needs it besides the weights.
    decided: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Delta.known[cls.__name__] = cls

    def __init__(self, num_experts: int, out_features: int, in_features: int, *, seed: int = 0) -> None:
        super().__init__()
        self.num_experts, self.out_features, self.in_features = num_experts, out_features, in_features
        self.seed = seed
        # What a file holds can differ from what the constructor drew: derive again after every load.
        self.register_load_state_dict_post_hook(_restore)

    @classmethod
    def at(cls, place: Place, num_experts: int, out_features: int, in_features: int, **dials: Any) -> "Delta":
        """The delta of a matrix that stands there. To most forms all matrices are alike but for the seed."""
        return cls(num_experts, out_features, in_features, **{**dials, "seed": place.seed})

    def dense(self, expert: int) -> Tensor:
        """Δ_e as a matrix (O, I). The oracle: slow, obvious, never optimised."""
        raise NotImplementedError

    def forward(self, x_SI: Tensor, expert_S: Tensor) -> Tensor:
        """All deltas applied to all slots at once, y_s = Δ_{e(s)} x_s: (S, I), (S,) → (S, O), building no matrix."""
        raise NotImplementedError

    def form(self) -> Form | Neurons | None:
        """What the kernels that work on whole layers need of this delta; None: they do not know it, so it is applied by
        `forward`."""
        return None

    def fit_(self, delta_EOI: Tensor) -> "Delta":
        """Become the closest representation of trained deltas (E, O, I); returns self."""
        for expert, delta_OI in enumerate(delta_EOI):
            self.fit_expert_(expert, delta_OI)
        return self

    def fit_expert_(self, expert: int, delta_OI: Tensor) -> None:
        """Become the closest representation of one expert's trained delta (O, I); the others stay as they are."""
        raise NotImplementedError

    def storage_bits(self) -> int:
        """Bits in a file, indices and scales included: those of the persistent tensors unless a form packs better."""
        return sum(tensor.numel() * tensor.element_size() * 8 for tensor in self.state_dict().values())

    def coded_params(self) -> int:
        """What is stored as k-bit codes instead of parameters, k/16 each as in the paper's tables."""
        return 0

    def restore_(self) -> None:
        """Derive again what no file holds (indices from a seed, say). Called after weights were loaded."""

    def extra_repr(self) -> str:
        return f"{self.num_experts} × ({self.out_features}, {self.in_features})"


def _restore(delta: Delta, incompatible_keys: object) -> None:
    delta.restore_()
