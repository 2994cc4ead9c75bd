"""What a code evaluation is asked for, checked."""

from dataclasses import dataclass

CODE_PROMPTS = ("completion", "magicoder", "chat")


@dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """The dials of a code evaluation.

    Attributes:
        prompt: how the model is asked, and what of its text is run: `ders.evaluation.code_prompts`.
        max_new_tokens: of one text.
        batch_size: texts generated at once; in low precision a score may move with it.
        time_limit: seconds for a program with its tests.
        num_problems: the first so many; None for all.
        workers: programs run at once. More than the machine has cores makes time-outs likelier.

    Raises:
        ValueError: a value out of range.
    """

    prompt: str = "completion"
    max_new_tokens: int = 512
    batch_size: int = 16
    time_limit: float = 3.0
    num_problems: int | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        if self.prompt not in CODE_PROMPTS:
            raise ValueError(f"evaluation.prompt must be one of {', '.join(CODE_PROMPTS)}: got {self.prompt!r}")
        for name in ("max_new_tokens", "batch_size", "num_problems", "workers"):
            value = getattr(self, name)
            if name == "num_problems" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"evaluation.{name} must be a whole number from 1 on: got {value!r}")
