"""Pretrained and frozen routers, and the paper's three routings."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ders
from ders.moe import moe_layers
from ders.upcycling import Upcycling, save_routers
from ders.upcycling.trainable import TRAINABLE, roles

SM = functools.partial(ders.SparseDelta, sparsity=0.9)
BIASED = functools.partial(ders.TopKRouter, bias=True)
IDS = torch.arange(12).view(1, 12)


def upcycled(dense_model: Any, **options: Any) -> tuple[Any, Any]:
    dense = dense_model("llama")
    model = dense_model("llama")
    model.load_state_dict(dense.state_dict())
    ders.upcycle(model, **{"top_k": 1, "layers": "all", **options})
    return dense, model


@pytest.mark.parametrize("delta", [None, SM])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize(
    ("weight", "router", "says"),
    [
        ("complement", ders.NoisyMLPRouter, "to the dense model within"),
        ("complement", BIASED, "to the dense model within"),
        ("one", BIASED, "multiplied by the sum of their gates"),
    ],
)
def test_the_certificate_knows_each_routing(
    delta: Any, extended: bool, weight: str, router: Any, says: str, dense_model: Any
) -> None:
    if extended and delta is None:
        with pytest.raises(ValueError, match="extended=true makes the universal FFN one more expert"):
            upcycled(dense_model, delta=delta, router=router, universal=True, extended=True)
        return
    dense, model = upcycled(
        dense_model, delta=delta, router=router, universal=True, universal_weight=weight, extended=extended
    )
    assert says in str(ders.certify(dense, model, input_ids=IDS))
    weights = [p for n, p in model.named_parameters() if "mlp" in n and n.endswith("down_proj.weight")]
    weights = weights or [p for n, p in model.named_parameters() if "weights_EOI.down_proj" in n]
    weights[0].data += 1e-3
    with pytest.raises(ValueError, match="differs from the dense model"):
        ders.certify(dense, model, input_ids=IDS)


def test_routers_travel_from_one_model_to_another(dense_model: Any, tmp_path: Path) -> None:
    _, teacher = upcycled(dense_model, delta=SM, router=BIASED, seed=7)
    for layer in moe_layers(teacher).values():
        layer.router.bias.data.normal_()
    file = tmp_path / "routers.safetensors"
    save_routers(teacher, file)
    _, model = upcycled(dense_model, router=functools.partial(BIASED, frozen=True), router_weights=file)
    for mine, theirs in zip(moe_layers(model).values(), moe_layers(teacher).values(), strict=True):
        assert torch.equal(mine.router.weight, theirs.router.weight)
        assert torch.equal(mine.router.bias, theirs.router.bias)
    section = model.config.quantization_config
    assert section["router"] == {"name": "TopKRouter", "bias": True, "frozen": True}
    assert "router_weights" not in section  # a path of one machine is no part of a model
    assert Upcycling.from_section(section).router["frozen"]


@pytest.mark.parametrize("trainable", ["paper", "all"])
def test_a_frozen_router_stays(trainable: str, dense_model: Any) -> None:
    _, model = upcycled(dense_model, delta=SM, router=functools.partial(BIASED, frozen=True))
    ders.set_trainable(model, trainable)
    of = roles(model)
    frozen = {name for name, role in of.items() if role == "frozen"}
    assert len(frozen) == 2 * len(moe_layers(model))
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in frozen)


def test_the_code_recipe_trains_the_rest_too(dense_model: Any) -> None:
    _, model = upcycled(dense_model, delta=SM)
    without = ders.set_trainable(model, "paper")
    assert ders.set_trainable(model, "paper", rest=True) == sum(p.numel() for p in model.parameters()) > without
    ders.set_trainable(model, "frozen_shared", rest=True)
    held = {role for n, role in roles(model).items() if not model.get_parameter(n).requires_grad}
    assert held == {"base"}
    assert "rest" not in TRAINABLE["paper"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.weight": None, "layers.0.bias": None}, r"holds routers of layers \[1, 2, 3\], and"),
        ({"layers.1.weight": torch.zeros(3, 5)}, r"router of layer 1: the file holds .*\(3, 5\)"),
        ({"head.weight": torch.zeros(1)}, "head.weight is no router's"),
    ],
)
def test_a_file_that_does_not_fit(change: dict[str, Any], message: str, dense_model: Any, tmp_path: Path) -> None:
    _, teacher = upcycled(dense_model, delta=SM, router=BIASED)
    file = tmp_path / "routers.safetensors"
    save_routers(teacher, file)
    tensors = {name: tensor for name, tensor in (load_file(file) | change).items() if tensor is not None}
    save_file(tensors, file)
    model = dense_model("llama")
    with pytest.raises(ValueError, match=message):
        ders.upcycle(model, top_k=1, layers="all", router=BIASED, router_weights=file)
    assert not moe_layers(model)  # nothing was replaced
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        ders.upcycle(model, top_k=1, layers="all", router=BIASED, router_weights=tmp_path / "none")
