"""What a training step computes."""

import contextlib
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ders.data.metrics import is_correct
from ders.kernels import global_sum, stable_hash
from ders.models.answers import answer_logits
from ders.models.bundle import ModelBundle
from ders.models.generation import generate_answers
from ders.moe import Routing, moe_layers, take_routings
from ders.training.building import Blueprint, local_tensors
from ders.training.strategies import FSDP2, DeepSpeed


class NonFiniteLossError(ArithmeticError):
    """The loss, or a weight, became NaN or infinite."""


class StageModule(lightning.LightningModule):
    """What all stages share: optimizer, schedule, exact resume and the check that the loss is finite.

    Args:
        optimizer: partial that takes parameters.
        schedule: partial that takes an optimizer and the number of steps.
        num_steps: optimizer steps of the whole stage, by which the schedule is laid out.
        seed: of everything random inside a step.
        identity: plain data stored in every checkpoint, to recognise another configuration's.
        skip_spikes: see `guarded`; None takes every step.
    """

    # A checkpoint holds what trains, and nothing else.
    strict_loading = False

    def __init__(
        self,
        bundle: ModelBundle,
        optimizer: Callable[..., Any],
        schedule: Callable[..., Any],
        num_steps: int,
        seed: int,
        identity: dict[str, Any],
        skip_spikes: float | None = None,
    ) -> None:
        super().__init__()
        self.bundle = bundle
        self.skip_spikes = skip_spikes
        self.recent_losses: deque[float] = deque(maxlen=100)
        self.make_optimizer, self.make_schedule, self.num_steps = optimizer, schedule, num_steps
        self.seed, self.identity = seed, identity

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if isinstance(optimizer, torch.optim.AdamW):
            # One pass over memory instead of ten. Not as the optimizer's own argument: Lightning then refuses to clip.
            for group in optimizer.param_groups:
                group["fused"] = True
        scheduler = self.make_schedule(optimizer, self.num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Randomness inside a step (dropout, routing noise) follows from the step alone: a resumed run draws the same.
        torch.manual_seed(stable_hash(self.seed, "batch", batch_idx, self.global_rank))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Frozen weights are the parent's, which whoever continues this run has.
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        state = checkpoint.get("state_dict", {})
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in trainable}
        checkpoint["ders_recent_losses"] = list(self.recent_losses)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.recent_losses.extend(checkpoint["ders_recent_losses"])
        expected = {name for name, p in self.named_parameters() if p.requires_grad}
        if checkpoint.get("state_dict") and set(checkpoint["state_dict"]) != expected:
            differing = sorted(set(checkpoint["state_dict"]) ^ expected)
            raise ValueError(f"the checkpoint holds other weights than train here, among them {differing[0]}")

    def refuse_ruined_weights(self) -> None:
        """A step can ruin the weights one step before the loss shows it: they must not replace a good checkpoint.

        Raises:
            NonFiniteLossError: on all processes, if the weights of one are not finite.
        """
        ruined = [name for name, tensor in local_tensors(self) if not torch.isfinite(tensor).all()]
        if global_sum(torch.tensor(len(ruined), device=self.device)):
            where = f", among them {ruined[0]}" if ruined else " on another process"
            raise NonFiniteLossError(
                f"after step {self.global_step} {len(ruined) or 'some'} weights are not finite{where}: not saved. "
                f"{self._advice()}"
            )

    def guarded(self, loss: Tensor, batch_idx: int) -> Tensor:
        """The loss of a micro-batch; times zero where it is a spike.

        With `skip_spikes`, a loss so many times the median of the last hundred is a spike, and its gradient is dropped:
        the step is taken all the same, on the optimizer's momentum, so that the order of the data stays.

        Raises:
            NonFiniteLossError: on all processes, if the loss of one is not finite.
        """
        # All processes stop together: one that stopped alone would leave the others waiting.
        total = global_sum(loss)
        if not torch.isfinite(total):
            rows = self.trainer.datamodule.rows_of(batch_idx)  # type: ignore[attr-defined]
            raise NonFiniteLossError(
                f"the loss became {total.item()} at step {self.global_step}, on rows {rows} of the training split. "
                f"{self._advice()}"
            )
        if self.skip_spikes is None:
            return loss
        mean = total.item() / self.trainer.world_size
        if len(self.recent_losses) >= 10 and mean > self.skip_spikes * statistics.median(self.recent_losses):
            self.log("train/skipped_spike", mean)
            return loss * 0
        self.recent_losses.append(mean)
        return loss

    def _advice(self) -> str:
        saver: Any = self.trainer.checkpoint_callback
        newest = None if saver is None else saver.newest()
        kept = "No checkpoint was written before" if newest is None else f"The last good checkpoint is {newest}"
        return f"{kept}: lower the learning rate or clip gradients, and start again"


class LanguageModule(StageModule):
    """Next-token loss on answers, plus the routers' losses.

    The loss is averaged over the answer tokens of all processes' micro-batches together, so it does not depend on how
    many processes share them.

    Args:
        bundle: model and tokenizer; what is trainable is already set. With a blueprint, the model's shapes are enough.
        blueprint: from which the model is built where it trains.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        router_loss_coef: multiplies the sum of the layers' router losses (MoE-LLaVA: 0.01).
        max_answer_tokens: longest answer validation generates.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        blueprint: Blueprint | None = None,
        gradient_checkpointing: bool = False,
        router_loss_coef: float,
        max_answer_tokens: int,
        **shared: Any,
    ) -> None:
        super().__init__(bundle, **shared)
        self.model, self.tokenizer = bundle.model, bundle.tokenizer
        self.blueprint, self.gradient_checkpointing = blueprint, gradient_checkpointing
        self.router_loss_coef, self.max_answer_tokens = router_loss_coef, max_answer_tokens
        # What each layer's router did since somebody last looked: choices per expert (E,).
        self.choices: dict[str, Tensor] = {}

    def cpu(self) -> "LanguageModule":
        # Lightning clears the device after an error, which may come before there are weights to move.
        return self if self.blueprint is not None else super().cpu()

    def configure_model(self) -> None:
        if self.blueprint is not None:
            trains = {name: p.requires_grad for name, p in self.model.named_parameters()}
            model = self.blueprint.build(self.trainer.strategy)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trains[name])
            self.bundle.model = self.model = model.train()
            self.blueprint = None
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def answer_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Over the answer tokens of all processes: the mean over the processes is the mean over the tokens."""
        batch = {key: tensor for key, tensor in batch.items() if key != "counted"}
        with self._attention(batch["labels"].shape[1]):
            logits_BPV, wanted_BP = answer_logits(self.model, batch)
        share = self.trainer.world_size / global_sum((wanted_BP >= 0).sum()).clamp(min=1)
        return F.cross_entropy(logits_BPV.flatten(0, 1).float(), wanted_BP.flatten(), reduction="sum") * share

    def _attention(self, length: int) -> contextlib.AbstractContextManager[Any]:
        # On a CPU torch's flash attention has a slow backward pass in bf16: on short rows several times that of plain
        # products. Recomputed activations are computed outside of this, and must be the same ones.
        short = self.device.type == "cpu" and length <= 256 and torch.is_autocast_enabled("cpu")
        return sdpa_kernel(SDPBackend.MATH) if short and not self.gradient_checkpointing else contextlib.nullcontext()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        only_text = "pixel_values" not in batch and hasattr(self.model.config, "vision_config")
        if only_text and isinstance(self.trainer.strategy, DeepSpeed | FSDP2):
            batch, only_text = self._with_blank_picture(batch), False
        loss = self.answer_loss(batch)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        routings = take_routings(self.model)
        if routings:
            counted = batch.get("counted", batch["attention_mask"].new_ones(1))
            mask_T = (batch["attention_mask"] * counted[:, None]).flatten()
            router_loss = self._router_loss(routings, mask_T)
            self._count_choices(routings, mask_T)
            self.log("train/router_loss", router_loss, sync_dist=True)
            loss = loss + self.router_loss_coef * router_loss
        if only_text:
            loss = loss + self._untouched()
        return self.guarded(loss, batch_idx)

    def _router_loss(self, routings: dict[str, Routing], mask_T: Tensor) -> Tensor:
        layers = moe_layers(self.model)
        return torch.stack([layers[name].router.loss(routing, mask_T) for name, routing in routings.items()]).sum()

    @torch.no_grad()
    def _count_choices(self, routings: dict[str, Routing], mask_T: Tensor) -> None:
        for name, routing in routings.items():
            kept_TK = (routing.top_k_weights_TK > 0) & mask_T.bool()[:, None]
            counts = routing.top_k_index_TK[kept_TK].bincount(minlength=routing.probs_TE.shape[1])
            self.choices[name] = self.choices.get(name, 0) + counts

    def _untouched(self) -> Tensor:
        # A text-only batch never meets the projector. Every process must touch every parameter in every step, or
        # distributed training waits for ever for its gradient.
        idle = [p for n, p in self.model.named_parameters() if "multi_modal_projector" in n and p.requires_grad]
        return sum((p.sum() * 0 for p in idle), torch.zeros((), device=self.device))

    def _with_blank_picture(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The text-only batch and one more row, a blank picture that no loss counts.

        Where weights are divided, every process must ask for the same ones in the same order, the tower's among them.
        And ZeRO sums gradients in the order in which they come: on a process where the projector's came at another
        place, they would be added to other parameters'.
        """
        config, pad_id = self.model.config, self.tokenizer.pad_token_id
        num_rows, length = batch["input_ids"].shape
        wide = max(length, self.bundle.image_tokens)
        picture = torch.arange(wide, device=self.device) < self.bundle.image_tokens
        size = config.vision_config.image_size
        dtype = next(self.model.parameters()).dtype
        return {
            "input_ids": _with_row(batch["input_ids"], picture * (config.image_token_id - pad_id) + pad_id, pad_id),
            "attention_mask": _with_row(batch["attention_mask"], picture.to(batch["attention_mask"].dtype), 0),
            "labels": _with_row(batch["labels"], torch.full_like(picture, -100, dtype=torch.long), -100),
            "pixel_values": torch.zeros(1, 3, size, size, device=self.device, dtype=dtype),
            "counted": torch.arange(num_rows + 1, device=self.device) < num_rows,
        }

    def on_after_backward(self) -> None:
        take_routings(self.model)  # activation checkpointing runs layers again in the backward pass

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if "labels" in batch:  # no process could generate an answer alone
            if "pixel_values" not in batch and hasattr(self.model.config, "vision_config"):
                batch = self._with_blank_picture(batch)
            loss = self.answer_loss(batch)
            take_routings(self.model)
            self.log("val/loss", loss, prog_bar=True, sync_dist=True, on_epoch=True, batch_size=len(batch["labels"]))
            return
        images = [item["image"] for item in batch["items"]]
        answers = generate_answers(self.model, self.tokenizer, batch["inputs"], self.max_answer_tokens, images)
        take_routings(self.model)
        correct = [is_correct(a, item["answer"]) for a, item in zip(answers, batch["items"], strict=True)]
        accuracy = torch.tensor(correct, dtype=torch.float32, device=self.device).mean()
        self.log("val/accuracy", accuracy, prog_bar=True, sync_dist=True, on_epoch=True, batch_size=len(correct))


def _with_row(rows: Tensor, row: Tensor, fill: int) -> Tensor:
    """(B, L), (W,) with W ≥ L → (B + 1, W)."""
    return torch.cat([F.pad(rows, (0, len(row) - rows.shape[1]), value=fill), row[None].to(rows.dtype)])


class TowerModule(StageModule):
    """Teaches a vision tower to name what its patches show: a small stand-in for a pretrained CLIP.

    Labels are one class per patch, or one per image, which is then read from the mean over the patches.

    Args:
        bundle: a LLaVA; of its parts only the tower is used and trained.
        num_classes: of the labels.
    """

    def __init__(self, bundle: ModelBundle, *, num_classes: int, **shared: Any) -> None:
        super().__init__(bundle, **shared)
        config = bundle.model.config
        self.tower = bundle.model.model.vision_tower
        self.feature_layer = config.vision_feature_layer
        self.head = nn.Linear(config.vision_config.hidden_size, num_classes)

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        features = self.tower(batch["pixel_values"], output_hidden_states=True).hidden_states[self.feature_layer]
        patches = features[:, 1:]  # the first is the class token, which LLaVA drops
        if batch["labels"].shape[1] == 1:
            patches = patches.mean(1, keepdim=True)
        return self.head(patches).flatten(0, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self._logits(batch), batch["labels"].flatten())
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return self.guarded(loss, batch_idx)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        labels = batch["labels"].flatten()
        correct = (self._logits(batch).argmax(-1) == labels)[labels >= 0].float()
        self.log("val/accuracy", correct.mean(), on_epoch=True, sync_dist=True, batch_size=len(correct))
