"""Learning-rate schedules, by transformers' names."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


def schedule(
    optimizer: Optimizer, num_steps: int, *, name: str, warmup_fraction: float = 0.0, warmup_steps: int | None = None
) -> LRScheduler:
    """A schedule over `num_steps` optimizer steps.

    Args:
        name: `linear`, `cosine`, `constant_with_warmup`, … as transformers names them.
        warmup_fraction: share of the steps in which the rate rises from zero.
        warmup_steps: their number, instead of a share.
    """
    warmup = round(warmup_fraction * num_steps) if warmup_steps is None else warmup_steps
    scheduler: LRScheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
    return scheduler
