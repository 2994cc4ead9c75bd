"""Methods that decide where deltas lie, or how large they are, while a stage runs."""

import math
from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from ders.deltas import Delta, RegrownSparseDelta
from ders.deltas.regrown import rearranged
from ders.kernels import from_first, stable_hash
from ders.moe import take_routings
from ders.training.batches import StepBatches
from ders.training.callbacks import has_stepped
from ders.training.strategies import state_format
from ders.upcycling.loads import allot_by_load
from ders.upcycling.positions import choose_by_fisher, expert_gradients, regrown_deltas

_STATE = "ders_supports"
GROWTHS = ("gradient", "random")


class StoredDecisions(Callback):
    """Keeps what deltas decide in training in every checkpoint, where Lightning has the weights that train alone.

    Raises:
        ValueError: optimizer states or weights are divided among processes.
    """

    def setup(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        state = state_format(trainer.strategy)
        if state != "whole":
            raise ValueError(
                f"this method makes choices where each process has all weights and optimizer states, and under "
                f"{state} they are divided: use trainer=cpu, gpu or ddp"
            )

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[_STATE] = {name: _decided(delta).clone() for name, delta in _deciding(module).items()}

    def on_load_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        for name, delta in _deciding(module).items():
            _decided(delta).copy_(checkpoint[_STATE][name])
            delta.restore_()


def _deciding(module: Any) -> dict[str, Delta]:
    found = {name: part for name, part in module.model.named_modules() if isinstance(part, Delta)}
    return {name: delta for name, delta in found.items() if delta.decided}


def _decided(delta: Delta) -> Tensor:
    assert delta.decided is not None
    return delta.get_buffer(delta.decided)


def _loss_of_rows(trainer: lightning.Trainer, module: Any, rows: list[int]) -> Tensor:
    """Of rows of the training split, the same on every process; the routers' own loss is left out."""
    torch.manual_seed(stable_hash(module.seed, "positions", trainer.global_step))
    data = trainer.datamodule.data  # type: ignore[attr-defined]
    batch = trainer.strategy.batch_to_device(data.collate([data.train[row] for row in rows]))
    with trainer.precision_plugin.forward_context():
        loss: Tensor = module.answer_loss(batch)
    return loss


class Calibrated(StoredDecisions):
    """Decides once, before the first step, by rows of the training split: the first ones that training will meet.

    Every process runs all of them, one by one.

    Args:
        calibration_rows: how many.

    Raises:
        ValueError: calibration_rows is out of range.
    """

    def __init__(self, calibration_rows: int) -> None:
        if not isinstance(calibration_rows, int) or calibration_rows < 1:
            raise ValueError(f"calibration_rows must be a whole number from 1 on: got {calibration_rows!r}")
        self.calibration_rows = calibration_rows

    def decide(self, model: nn.Module, loss_of: Callable[[int], Tensor], rows: list[int]) -> None:
        """Change the model's deltas by what the loss of single rows, or the routing on the way to it, says."""
        raise NotImplementedError

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.global_step:
            return  # it came with the checkpoint
        data = trainer.datamodule  # type: ignore[attr-defined]
        rows = StepBatches(len(data.data.train), self.calibration_rows, 1, seed=data.seed).rows_of_step(0)
        self.decide(module.model, lambda row: _loss_of_rows(trainer, module, [row]), rows.tolist())
        take_routings(module.model)
        for delta in _deciding(module).values():
            from_first(_decided(delta))
            delta.restore_()


class FisherPositions(Calibrated):
    """Gives deltas the positions to which the loss is most sensitive: see `choose_by_fisher`.

    Costs a forward and backward pass of each row.
    """

    def decide(self, model: nn.Module, loss_of: Callable[[int], Tensor], rows: list[int]) -> None:
        choose_by_fisher(model, loss_of, rows)


class RanksByLoad(Calibrated):
    """Gives experts ranks by the tokens that they serve: see `allot_by_load`. Costs a forward pass of each row."""

    def decide(self, model: nn.Module, loss_of: Callable[[int], Tensor], rows: list[int]) -> None:
        allot_by_load(model, loss_of, rows)


class RegrowPositions(StoredDecisions):
    """Every few steps drops the smallest values of every expert and grows others from zero (RigL, arXiv 1911.11134).

    The fraction that is exchanged falls along a half cosine and is zero from `until` of the stage on; the optimizer
    begins anew at grown positions. Growth by gradient costs, each time, a forward and backward pass of `num_rows` rows,
    and for every matrix of every expert the product of a vanilla expert's weight gradient.

    Args:
        update_every: optimizer steps between exchanges.
        drop_fraction: of an expert's values, at the beginning (0.3 in the paper).
        grow: where: at the largest `gradient` of the expert's full weight, or at `random` (SET, arXiv 1707.04780).
        until: fraction of the stage (0.75 in the paper).
        num_rows: of the step just taken, whose loss gives the gradient.

    Raises:
        ValueError: a dial is out of range.
    """

    def __init__(
        self, update_every: int, drop_fraction: float, grow: str = "gradient", until: float = 0.75, num_rows: int = 16
    ) -> None:
        for name, value in (("update_every", update_every), ("num_rows", num_rows)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on: got {value!r}")
        for name, share in (("drop_fraction", drop_fraction), ("until", until)):
            if not isinstance(share, int | float) or not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1]: got {share!r}")
        if grow not in GROWTHS:
            raise ValueError(f"grow must be one of {', '.join(GROWTHS)}: got {grow!r}")
        self.update_every, self.drop_fraction, self.grow = update_every, drop_fraction, grow
        self.until, self.num_rows = until, num_rows

    def fraction_at(self, step: int, num_steps: int) -> float:
        """How much of an expert is exchanged after a step of a stage of so many."""
        end = self.until * num_steps
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        fraction = self.fraction_at(step, module.num_steps)
        if not has_stepped(trainer) or step % self.update_every or fraction == 0:
            return
        (optimizer,) = trainer.optimizers
        scores = self._random(module, step) if self.grow == "random" else self._gradients(trainer, module, batch_idx)
        for delta, expert, scores_OI in scores:
            count = round(fraction * delta.num_kept)
            # The first process decides: on a GPU sums come in another order on each.
            positions_N, source_N = map(from_first, delta.regrown(expert, count, scores_OI))
            delta.rearrange_(expert, positions_N, source_N)
            rearrange_state_(optimizer.state.get(delta.values_EN, {}), delta, expert, source_N)

    def _gradients(self, trainer: lightning.Trainer, module: Any, batch_idx: int) -> Any:
        rows = trainer.datamodule.rows_of(batch_idx)[: self.num_rows]  # type: ignore[attr-defined]
        yield from expert_gradients(module.model, lambda: _loss_of_rows(trainer, module, rows))
        take_routings(module.model)

    def _random(self, module: Any, step: int) -> Any:
        for number, delta in enumerate(regrown_deltas(module.model)):
            for expert in range(delta.num_experts):
                generator = torch.Generator().manual_seed(stable_hash(module.seed, "regrow", step, number, expert))
                scores_OI = torch.rand(delta.out_features, delta.in_features, generator=generator)
                yield delta, expert, scores_OI.to(delta.values_EN.device)


@torch.no_grad()
def rearrange_state_(state: dict[str, Any], delta: RegrownSparseDelta, expert: int, source_N: Tensor) -> None:
    """What an optimizer knows of an expert's values goes with them, and is zero for new ones.

    Raises:
        ValueError: it keeps something else than a number for every value.
    """
    for name, kept in state.items():
        if not isinstance(kept, Tensor) or kept.dim() == 0:
            continue
        if kept.shape != delta.values_EN.shape:
            raise ValueError(
                f"the optimizer's {name} is not kept value by value, so it cannot follow positions that move: use "
                "optimizer=adamw"
            )
        kept[expert] = rearranged(kept[expert], source_N)
