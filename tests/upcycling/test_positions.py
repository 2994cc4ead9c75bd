"""Positions by what the loss says, against dense and vanilla models."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import ders
from ders.moe import moe_layers
from ders.upcycling.positions import choose_by_fisher, expert_gradients

SAMPLES = torch.randint(3, 60, (5, 1, 13), generator=torch.Generator().manual_seed(0))
SCORED = functools.partial(ders.ScoredSparseDelta, sparsity=0.9)
REGROWN = functools.partial(ders.RegrownSparseDelta, sparsity=0.9)


def loss_of(model: Any, ids: Tensor = SAMPLES[:, 0]) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("model_type", ["llama", "phi", "phi3"])
def test_scores_are_those_of_the_dense_model(model_type: str, dense_model: Callable[..., Any]) -> None:
    dense = dense_model(model_type).double()
    model = copy.deepcopy(dense)
    ders.upcycle(model, delta=SCORED, num_experts=3)
    ders.set_trainable(model, "adapter")
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert choose_by_fisher(model, functools.partial(loss_of, model), SAMPLES) == 2 * len(
        next(iter(moe_layers(model).values())).form.projections
    )
    assert trained == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    for name, layer in moe_layers(model).items():
        for projection, delta in layer.experts.deltas.items():
            weight = dense.get_parameter(f"{name}.{projection}.weight")
            squares = [torch.autograd.grad(loss_of(dense, ids), weight)[0].square() for ids in SAMPLES]
            order = torch.stack(squares).sum(0).flatten().argsort(descending=True)[: 3 * delta.num_kept]
            for expert in range(3):
                assert delta.positions(expert).tolist() == sorted(order[expert::3].tolist())


@pytest.mark.parametrize("model_type", ["llama", "phi", "phi3"])
def test_an_experts_gradient_is_a_vanilla_experts(model_type: str, dense_model: Callable[..., Any]) -> None:
    model, vanilla = (dense_model(model_type).double() for _ in range(2))
    ders.upcycle(model, delta=REGROWN, seed=2)
    ders.upcycle(vanilla, seed=2)
    for layer, full in zip(moe_layers(model).values(), moe_layers(vanilla).values(), strict=True):
        for name, delta in layer.experts.deltas.items():
            torch.nn.init.normal_(delta.values_EN, std=0.1)
            full.experts.weights_EOI[name].data += torch.stack([delta.dense(e) for e in range(4)])
    before = loss_of(model)
    loss_of(vanilla).backward()
    expected = {
        (layer, name, expert): gradient
        for layer, full in moe_layers(vanilla).items()
        for name, weight in full.experts.weights_EOI.items()
        for expert, gradient in enumerate(weight.grad)
    }
    owners = {d: (layer, name) for layer, m in moe_layers(model).items() for name, d in m.experts.deltas.items()}
    found = {
        (*owners[delta], expert): g for delta, expert, g in expert_gradients(model, functools.partial(loss_of, model))
    }
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(loss_of(model), before)  # nobody watches any more


def test_a_loss_that_fails_leaves_nobody_watching(dense_model: Callable[..., Any]) -> None:
    model = dense_model()
    ders.upcycle(model, delta=REGROWN)

    def fail() -> Tensor:
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        next(expert_gradients(model, fail))
    assert all(d.watching is None for layer in moe_layers(model).values() for d in layer.experts.deltas.values())


def test_chosen_positions_come_back_with_a_folder(dense_model: Callable[..., Any], tmp_path: Path) -> None:
    model = dense_model()
    ders.upcycle(model, delta=SCORED)
    choose_by_fisher(model, functools.partial(loss_of, model), SAMPLES[:2])
    for layer in moe_layers(model).values():
        for delta in layer.experts.deltas.values():
            torch.nn.init.normal_(delta.values_EN)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=SAMPLES[0]).logits, model(input_ids=SAMPLES[0]).logits)


def test_there_must_be_something_to_choose_and_to_choose_by(dense_model: Callable[..., Any]) -> None:
    model = dense_model()
    with pytest.raises(ValueError, match="no deltas whose positions are chosen by a score"):
        choose_by_fisher(model, functools.partial(loss_of, model), SAMPLES)
    ders.upcycle(model, delta=SCORED)
    with pytest.raises(ValueError, match="there is none"):
        choose_by_fisher(model, functools.partial(loss_of, model), [])
