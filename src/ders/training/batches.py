"""Which rows a step trains on: a pure function of (seed, step, world size), so a resumed run meets the same batches."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from ders.kernels import stable_hash


class StepBatches(Sampler[list[int]]):
    """Row indices of every micro-batch of a run, from `start` on.

    The rows are one endless sequence of shuffled epochs; step s takes the s-th piece of `global_batch_size` of it,
    split over accumulation and processes. So the rows of a step do not depend on how many devices share it.

    Args:
        num_rows: rows of the data set.
        global_batch_size: rows of one optimizer step, over all devices and accumulated micro-batches.
        num_steps: optimizer steps of the whole run.
        accumulate: micro-batches per step.
        start: micro-batches already trained on.
        lengths: of each row, whether it has an image and how long it is; then a step's rows all have an image or all
            have none, and are of like length, but for those that do not fill a batch of their own.

    Raises:
        ValueError: the global batch cannot be split evenly.
    """

    def __init__(
        self,
        num_rows: int,
        global_batch_size: int,
        num_steps: int,
        *,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        lengths: Sequence[tuple[bool, int]] | None = None,
    ) -> None:
        if global_batch_size % (accumulate * world_size):
            raise ValueError(
                f"global_batch_size={global_batch_size} cannot be split over {world_size} processes × "
                f"accumulate={accumulate}: make it a multiple of {accumulate * world_size}"
            )
        self.num_rows, self.global_batch_size, self.num_steps = num_rows, global_batch_size, num_steps
        self.accumulate, self.seed, self.rank, self.world_size, self.start = accumulate, seed, rank, world_size, start
        self.lengths = lengths
        # A million rows take seconds to shuffle and sort: once an epoch, not once a batch.
        self.order_of = functools.lru_cache(maxsize=2)(self._epoch)

    def __len__(self) -> int:
        # The whole run's length, also after a resume: Lightning counts the batches of an epoch from its beginning.
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, len(self)):
            rows = self.rows_of_step(batch // self.accumulate)
            yield rows.view(self.accumulate, self.world_size, -1)[batch % self.accumulate, self.rank].tolist()

    def rows_of_step(self, step: int) -> torch.Tensor:
        """Row indices of the whole global batch (B,)."""
        first = step * self.global_batch_size
        places = torch.arange(first, first + self.global_batch_size)
        epochs = range(first // self.num_rows, (first + self.global_batch_size - 1) // self.num_rows + 1)
        shuffled = torch.cat([self.order_of(epoch) for epoch in epochs])
        return shuffled[places - epochs[0] * self.num_rows]

    def _epoch(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(stable_hash(self.seed, "epoch", epoch))
        order = torch.randperm(self.num_rows, generator=generator)
        if self.lengths is None:
            return order
        # What completes the batch that the epoch before began.
        first = -epoch * self.num_rows % self.global_batch_size
        grouped = group(order[first:].tolist(), self.lengths, self.global_batch_size, generator)
        return torch.cat([order[:first], torch.tensor(grouped, dtype=order.dtype)])


def group(
    order: Sequence[int], lengths: Sequence[tuple[bool, int]], batch_size: int, generator: torch.Generator
) -> list[int]:
    """The same rows, so ordered that batches are of one modality and of like length, and still come in random order.

    Within a modality, runs of 50 batches are sorted by length, as LLaVA does it; rows that fill no batch come last.
    """
    batches, rest = [], []
    for has_image in (True, False):
        rows = [row for row in order if lengths[row][0] == has_image]
        full = len(rows) - len(rows) % batch_size
        rest += rows[full:]
        for start in range(0, full, 50 * batch_size):
            run = sorted(rows[start : min(start + 50 * batch_size, full)], key=lambda row: lengths[row][1])
            batches += [run[i : i + batch_size] for i in range(0, len(run), batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [row for number in shuffled for row in batches[number]] + rest
