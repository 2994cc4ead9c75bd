import itertools

import pytest
import torch

from ders.training.batches import StepBatches


def test_every_row_once_an_epoch() -> None:
    rows = [r for batch in StepBatches(30, 6, 5, seed=1) for r in batch]
    assert sorted(rows) == list(range(30))
    again = [r for batch in StepBatches(30, 6, 10, seed=1) for r in batch]
    assert again[:30] == rows
    assert sorted(again[30:]) == list(range(30))
    assert again[30:] != rows


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_a_step_holds_the_same_rows_however_it_is_split(world_size: int, accumulate: int) -> None:
    whole = list(StepBatches(17, 12, 4, seed=3))
    parts = [
        list(StepBatches(17, 12, 4, seed=3, accumulate=accumulate, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for step, rows in enumerate(whole):
        pieces = [part[step * accumulate : (step + 1) * accumulate] for part in parts]
        assert sorted(itertools.chain(*itertools.chain(*pieces))) == sorted(rows)


def test_a_resumed_run_meets_the_rest_of_the_same_batches() -> None:
    whole = list(StepBatches(17, 4, 9, accumulate=2, seed=3))
    rest = StepBatches(17, 4, 9, accumulate=2, seed=3, start=7)
    assert list(rest) == whole[7:]
    assert len(rest) == 18


def test_the_seed_decides_and_torchs_generator_does_not() -> None:
    torch.manual_seed(0)
    first = list(StepBatches(40, 8, 2, seed=0))
    torch.manual_seed(1)
    assert list(StepBatches(40, 8, 2, seed=0)) == first
    assert list(StepBatches(40, 8, 2, seed=1)) != first


def test_an_uneven_split_is_refused() -> None:
    with pytest.raises(ValueError, match="make it a multiple of 6"):
        StepBatches(10, 8, 1, accumulate=2, world_size=3)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(103, 8), (96, 8), (7, 4), (40, 40)])
def test_grouped_batches_are_of_one_modality_and_every_row_comes_once_an_epoch(num_rows: int, batch_size: int) -> None:
    lengths = [(row % 3 != 0, (row * 37) % 101) for row in range(num_rows)]
    steps = 3 * num_rows // batch_size
    rows = list(itertools.chain(*StepBatches(num_rows, batch_size, steps, seed=2, lengths=lengths)))
    for epoch in range(len(rows) // num_rows):
        assert sorted(rows[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    batches = list(StepBatches(num_rows, batch_size, steps, seed=2, lengths=lengths))
    mixed = sum(len({lengths[row][0] for row in batch}) > 1 for batch in batches)
    # Two remainders an epoch, and the batch that two epochs share.
    assert mixed <= 3 * 3
    assert batches == list(StepBatches(num_rows, batch_size, steps, seed=2, lengths=lengths))
    assert num_rows < 100 or batches != list(StepBatches(num_rows, batch_size, steps, seed=3, lengths=lengths))


def test_grouping_wastes_little_padding() -> None:
    lengths = [(True, (row * 37) % 101) for row in range(400)]

    def padding(**options: object) -> int:
        batches = StepBatches(400, 8, 50, seed=2, **options)  # type: ignore[arg-type]
        return sum(8 * max(lengths[r][1] for r in b) - sum(lengths[r][1] for r in b) for b in batches)

    assert padding(lengths=lengths) < 0.2 * padding()
