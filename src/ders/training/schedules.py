"""Learning-rate schedules, by transformers' names."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


def schedule(optimizer: Optimizer, num_steps: int, *, name: str, warmup_fraction: float = 0.0) -> LRScheduler:
    """A schedule over `num_steps` optimizer steps.

    Args:
        name: `linear`, `cosine`, `constant_with_warmup`, … as transformers names them.
        warmup_fraction: share of the steps in which the rate rises from zero.
    """
    scheduler: LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=round(warmup_fraction * num_steps), num_training_steps=num_steps
    )
    return scheduler
