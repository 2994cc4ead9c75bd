import functools
from typing import Any

import pytest

import ders
from ders.upcycling.trainable import ROLES, TRAINABLE, roles

SM = functools.partial(ders.SparseDelta, sparsity=0.9)


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def model(llava_model: Any) -> Any:
    ders.upcycle(llava_model.model, delta=SM, layers=[0])
    return llava_model.model


def test_every_parameter_has_a_role(model: Any) -> None:
    of = roles(model)
    assert of.keys() == dict(model.named_parameters()).keys()
    assert set(of.values()) == set(ROLES) - {"frozen"}


def test_paper_is_stage_3(model: Any) -> None:
    count = ders.set_trainable(model, "paper")
    names = trained(model)
    assert count == ders.count_parameters(model).trainable_params
    assert "model.language_model.layers.1.mlp.up_proj.weight" in names  # FFNs of dense layers train as well
    assert "model.language_model.layers.0.mlp.up_proj.weight" in names
    assert "model.language_model.layers.0.mlp.router.weight" in names
    assert any("multi_modal_projector" in name for name in names)
    assert not any(part in name for name in names for part in ("self_attn", "vision_tower", "embed_tokens", "norm"))


def test_frozen_shared_differs_from_paper_by_the_base_alone(model: Any) -> None:
    ders.set_trainable(model, "paper")
    paper = trained(model)
    ders.set_trainable(model, "frozen_shared")
    base = {f"model.language_model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert paper - trained(model) == base


def test_adapter_is_routers_and_deltas(model: Any) -> None:
    ders.set_trainable(model, "adapter")
    assert {name.split(".mlp.")[1].split(".")[0] for name in trained(model)} == {"router", "experts"}


def test_all_leaves_the_tower_alone(model: Any) -> None:
    ders.set_trainable(model, "all")
    assert {n for n, _ in model.named_parameters() if "vision_tower" not in n} == trained(model)


@pytest.mark.parametrize("trainable", ["adapter", "frozen_shared"])
def test_what_needs_a_shared_base_says_so(llava_model: Any, trainable: str) -> None:
    ders.upcycle(llava_model.model)
    with pytest.raises(ValueError, match=f"trainable={trainable} needs experts over a shared base"):
        ders.set_trainable(llava_model.model, trainable)


def test_unknown_or_empty(dense_model: Any) -> None:
    with pytest.raises(ValueError, match="trainable must be one of"):
        ders.set_trainable(dense_model(), "everything")
    with pytest.raises(ValueError, match="trains nothing in this model: it has no tower"):
        ders.set_trainable(dense_model(), "tower")


def test_biases_of_experts_train_as_adapter(dense_model: Any) -> None:
    model = dense_model("phi")
    ders.upcycle(model, delta=SM)
    ders.set_trainable(model, "adapter")
    assert "model.layers.0.mlp.experts.biases_EO.fc1" in trained(model)
    assert "adapter" in TRAINABLE
