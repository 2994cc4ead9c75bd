"""What was done to a dense model, as plain data: in memory, and in the `ders` section of a `config.json`."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from ders.deltas import Delta
from ders.moe import UNIVERSAL_WEIGHTS

FORMAT_VERSION = 1
# Entries of a section that say how the file is written or where it came from, not what to build.
_ABOUT_THE_FILE = ("quant_method", "format_version", "provenance")


@dataclass(frozen=True)
class Upcycling:
    """What was done to a dense model, as plain data: enough to do it again.

    Attributes:
        num_experts, top_k: E and K.
        layers: indices of the decoder layers whose FFN was replaced.
        delta: class name and dials of the delta; None for vanilla experts.
        router: class name and dials of the router.
        universal: a dense FFN serves every token beside the experts.
        universal_weight: what multiplies its output, `one` or `complement` (one minus the token's gate weights).
        extended: that FFN is one more expert over the same base, instead of a copy of its own.
        seed: root of everything random.
    """

    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    delta: dict[str, Any] | None = None
    router: dict[str, Any] = field(default_factory=lambda: {"name": "TopKRouter"})
    universal: bool = False
    universal_weight: str = "one"
    extended: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1: got {self.num_experts}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts={self.num_experts}: got {self.top_k}")
        if self.universal_weight not in UNIVERSAL_WEIGHTS:
            raise ValueError(
                f"universal_weight must be {' or '.join(UNIVERSAL_WEIGHTS)}: got {self.universal_weight!r}"
            )
        if self.extended and (not self.universal or self.delta is None):
            raise ValueError(
                "extended=true makes the universal FFN one more expert over the shared base: it needs a universal FFN "
                "and experts that are deltas"
            )

    def to_section(self, provenance: dict[str, Any] | None = None) -> dict[str, Any]:
        """The `ders` section of a `config.json`, where transformers looks for a quantizer."""
        about = {"quant_method": "ders", "format_version": FORMAT_VERSION}
        section = {**about, **asdict(self), "layers": list(self.layers)}
        return section if provenance is None else {**section, "provenance": provenance}

    @classmethod
    def from_section(cls, section: dict[str, Any]) -> "Upcycling":
        """What a `ders` section says.

        Raises:
            ValueError: its format version is unknown, or it is not such a section.
        """
        version = section.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"config.json: format_version {version!r} is not known to this ders (it reads {FORMAT_VERSION}). "
                "Update ders, or write the folder again with this version"
            )
        try:
            return cls(
                **{k: v for k, v in section.items() if k not in (*_ABOUT_THE_FILE, "layers")},
                layers=tuple(section["layers"]),
            )
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"config.json: its ders section is damaged: {error}") from error


def describe_delta(delta: Callable[..., Delta]) -> dict[str, Any]:
    """Class name and dials of a delta as plain data."""
    return describe(delta, Delta)


def describe(factory: Callable[..., Any], kind: type) -> dict[str, Any]:
    """Class name and bound keywords of a factory, as plain data."""
    bound = factory if isinstance(factory, functools.partial) else functools.partial(factory)
    if bound.args or not (isinstance(bound.func, type) and issubclass(bound.func, kind)):
        raise TypeError(
            f"expected a subclass of {kind.__name__}, or functools.partial of one with keywords only: got {factory!r}"
        )
    return {"name": bound.func.__name__, **bound.keywords}


def bind(description: dict[str, Any], known: dict[str, Any], what: str) -> functools.partial[Any]:
    dials = dict(description)
    name = dials.pop("name")
    if name not in known:
        raise ValueError(
            f"unknown {what} {name!r}: known are {', '.join(sorted(known))}. Import the module that defines it first"
        )
    return functools.partial(known[name], **dials)
