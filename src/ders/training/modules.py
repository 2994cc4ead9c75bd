"""What a training step computes."""

from collections.abc import Callable
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ders.data.metrics import is_correct
from ders.kernels import global_sum, stable_hash
from ders.models.bundle import ModelBundle
from ders.models.generation import generate_answers
from ders.moe import Routing, moe_layers, take_routings


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
    """

    def __init__(
        self,
        optimizer: Callable[..., Any],
        schedule: Callable[..., Any],
        num_steps: int,
        seed: int,
        identity: dict[str, Any],
    ) -> None:
        super().__init__()
        self.make_optimizer, self.make_schedule, self.num_steps = optimizer, schedule, num_steps
        self.seed, self.identity = seed, identity

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        scheduler = self.make_schedule(optimizer, self.num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Randomness inside a step (dropout, routing noise) follows from the step alone: a resumed run draws the same.
        torch.manual_seed(stable_hash(self.seed, "batch", batch_idx, self.global_rank))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A step can ruin the weights one step before the loss shows it: such a checkpoint must not replace a good one.
        ruined = [n for n, p in self.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        if ruined:
            raise NonFiniteLossError(
                f"after step {self.global_step} {len(ruined)} weights are not finite, among them {ruined[0]}: not "
                "saved. The last good checkpoint is kept: lower the learning rate or clip gradients, and start again"
            )
        checkpoint["ders_identity"] = self.identity
        # Lightning logs a step's row after the callbacks that save: a process killed in between would lose it.
        row = {key: float(value) for key, value in self.trainer.callback_metrics.items() if key.startswith("train/")}
        checkpoint["ders_last_row"] = row
        checkpoint["ders_accumulate"] = self.trainer.accumulate_grad_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning counts micro-batches through: another number of them would mix two steps' rows from here on.
        before, now = checkpoint["ders_accumulate"], self.trainer.accumulate_grad_batches
        if before != now:
            raise ValueError(
                f"the checkpoint was written with {before} micro-batches a step, and on these devices there are {now}: "
                "continue on as many devices as before, or set device_batch_size so that their number is the same"
            )

    def refuse_non_finite(self, loss: Tensor) -> None:
        # All processes stop together: one that stopped alone would leave the others waiting.
        if global_sum((~torch.isfinite(loss)).int()):
            raise NonFiniteLossError(
                f"the loss became {loss.item()} at step {self.global_step}. The last good checkpoint is kept: lower "
                "the learning rate or clip gradients, and start again"
            )


class LanguageModule(StageModule):
    """Next-token loss on answers, plus the routers' losses.

    The loss is averaged over the answer tokens of all processes' micro-batches together, so it does not depend on how
    many processes share them.

    Args:
        bundle: model and tokenizer; what is trainable is already set.
        router_loss_coef: multiplies the sum of the layers' router losses (MoE-LLaVA: 0.01).
        max_answer_tokens: longest answer validation generates.
    """

    def __init__(self, bundle: ModelBundle, *, router_loss_coef: float, max_answer_tokens: int, **shared: Any) -> None:
        super().__init__(**shared)
        self.model, self.tokenizer = bundle.model, bundle.tokenizer
        self.router_loss_coef, self.max_answer_tokens = router_loss_coef, max_answer_tokens
        # What each layer's router did since somebody last looked: choices per expert (E,).
        self.choices: dict[str, Tensor] = {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        batch = dict(batch)
        labels = batch.pop("labels")
        logits = self.model(**batch, use_cache=False).logits[:, :-1]
        num_answer_tokens = (labels[:, 1:] >= 0).sum()
        share = self.trainer.world_size / global_sum(num_answer_tokens).clamp(min=1)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum") * share
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        routings = take_routings(self.model)
        if routings:
            mask_T = batch["attention_mask"].flatten()
            router_loss = self._router_loss(routings, mask_T)
            self._count_choices(routings, mask_T)
            self.log("train/router_loss", router_loss, sync_dist=True)
            loss = loss + self.router_loss_coef * router_loss
        if "pixel_values" not in batch:
            loss = loss + self._untouched()
        self.refuse_non_finite(loss)
        return loss

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

    def on_after_backward(self) -> None:
        take_routings(self.model)  # activation checkpointing runs layers again in the backward pass

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        answers = generate_answers(self.model, self.tokenizer, batch["inputs"], self.max_answer_tokens)
        take_routings(self.model)
        correct = [is_correct(a, item["answer"]) for a, item in zip(answers, batch["items"], strict=True)]
        accuracy = torch.tensor(correct, dtype=torch.float32, device=self.device).mean()
        self.log("val/accuracy", accuracy, prog_bar=True, sync_dist=True, on_epoch=True, batch_size=len(correct))


class TowerModule(StageModule):
    """Teaches a vision tower to name what its patches show: a small stand-in for a pretrained CLIP.

    Labels are one class per patch, or one per image, which is then read from the mean over the patches.

    Args:
        bundle: a LLaVA; of its parts only the tower is used and trained.
        num_classes: of the labels.
    """

    def __init__(self, bundle: ModelBundle, *, num_classes: int, **shared: Any) -> None:
        super().__init__(**shared)
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
        self.refuse_non_finite(loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        labels = batch["labels"].flatten()
        correct = (self._logits(batch).argmax(-1) == labels)[labels >= 0].float()
        self.log("val/accuracy", correct.mean(), on_epoch=True, sync_dist=True, batch_size=len(correct))
