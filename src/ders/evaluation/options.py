"""What a speed benchmark is asked for, checked."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ders.evaluation.timing import significant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CHOICES = {
    "grid": ("default", "full"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", *DTYPES),
}


@dataclass(frozen=True)
class Options:
    """The dials that the suites layer, decode and train share.

    Attributes:
        grid: `default`, or `full`: more shapes, mixtures and tokens, for a GPU.
        device: `auto` is a GPU where torch sees one.
        dtype: `auto` is float32 on a CPU and bfloat16 on a GPU.
        budget_seconds: about how long the whole suite may take; every cell runs a few rounds in any case.

    Raises:
        ValueError: a value that is not one of these.
    """

    grid: str = "default"
    device: str = "auto"
    dtype: str = "auto"
    budget_seconds: float = 420.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}: got {getattr(self, name)!r}")
        if isinstance(self.budget_seconds, bool) or not isinstance(self.budget_seconds, int | float):
            raise ValueError(f"budget_seconds must be a number of seconds: got {self.budget_seconds!r}")
        if not 0 < self.budget_seconds < float("inf"):
            raise ValueError(f"budget_seconds must be positive: got {self.budget_seconds}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda: torch sees no GPU here. Use device=cpu or device=auto")

    @property
    def chosen_device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def chosen_dtype(self) -> torch.dtype:
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        return torch.float32 if self.chosen_device == "cpu" else torch.bfloat16


class Shares:
    """Divides what is left of the time among the parts that are left, by weight."""

    def __init__(self, budget_seconds: float, weights: list[float], clock: Callable[[], float]) -> None:
        self.clock, self.ends = clock, clock() + budget_seconds
        self.left = list(weights)

    def take(self) -> float:
        """Seconds for the next part."""
        total, own = sum(self.left), self.left.pop(0)
        return max(0.0, self.ends - self.clock()) * own / total


def dials(options: Options) -> dict[str, object]:
    """What was chosen, for the record."""
    return {
        "grid": options.grid,
        "device": options.chosen_device,
        "dtype": str(options.chosen_dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "budget_seconds": significant(options.budget_seconds),
    }
