from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ders.training import schedule
from ders.training.callbacks import RoutingMonitor, layer_label
from ders.training.modules import LanguageModule


def test_layer_label() -> None:
    assert layer_label("model.language_model.layers.2.mlp") == "layer_2"


def test_load_entropy_and_dead_experts(llava_model: Any) -> None:
    shared = {"optimizer": None, "schedule": schedule, "num_steps": 1, "seed": 0, "identity": {}}
    module = LanguageModule(llava_model, router_loss_coef=0.0, max_answer_tokens=2, **shared)
    module.choices = {"m.layers.0.mlp": torch.tensor([2, 2, 2, 2]), "m.layers.4.mlp": torch.tensor([8, 0, 0, 0])}
    logged: dict[str, float] = {}
    progress = SimpleNamespace(current=SimpleNamespace(ready=10))
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.update(values))
    trainer = SimpleNamespace(global_step=10, max_steps=20, accumulate_grad_batches=1, fit_loop=loops, loggers=[logger])
    RoutingMonitor().on_train_batch_end(trainer, module)
    assert logged["routing/layer_0/entropy"] == pytest.approx(1)
    assert logged["routing/layer_0/dead_experts"] == 0
    assert logged["routing/layer_4/entropy"] == 0
    assert logged["routing/layer_4/dead_experts"] == 3
    assert logged["routing/layer_4/load_0"] == 1
    assert module.choices == {}


def test_schedules_begin_with_a_warm_up() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = schedule(optimizer, 100, name="linear", warmup_fraction=0.1)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 0
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
