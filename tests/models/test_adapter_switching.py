"""Several adapters over one parent in memory."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import logits, tokens, trained
from transformers import AutoModelForCausalLM

from ders.models.adapters import load_adapter, save_adapter
from ders.moe import moe_layers
from ders.upcycling.adapters import adapters, remove_adapter, set_adapter


@pytest.fixture
def two(dense_model: Callable[..., Any], tmp_path: Path) -> tuple[Any, dict[str | None, Any]]:
    """A parent with two adapters over other layers, and the whole models they were saved from."""
    dense = dense_model("phi")
    models = {None: copy.deepcopy(dense), "sm": trained(dense), "lm": trained(dense, "ders_lm", seed=1, layers=[2, 3])}
    for name in ("sm", "lm"):
        save_adapter(models[name], tmp_path / name, parent=models[None])
        load_adapter(dense, tmp_path / name, name=name)  # the second while the first is active
    return dense, models


def test_switching(two: tuple[Any, dict[str | None, Any]], tmp_path: Path) -> None:
    dense, models = two
    assert adapters(dense) == ["sm", "lm"]
    expected = {name: (logits(model), tokens(model)) for name, model in models.items()}
    for i, name in enumerate(["sm", "lm", None, "lm", "sm", None]):
        set_adapter(dense, name)
        assert torch.equal(logits(dense), expected[name][0])
        assert torch.equal(tokens(dense), expected[name][1])
        # What is not active is in no state_dict, no optimizer and no folder.
        assert set(dense.state_dict()) == set(models[name].state_dict())
        assert len(list(dense.parameters())) == len(list(models[name].parameters()))
        dense.save_pretrained(tmp_path / f"whole{i}")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"whole{i}").eval()
        assert torch.equal(logits(loaded), expected[name][0])
        assert hasattr(loaded.config, "quantization_config") == (name is not None)
    with pytest.raises(ValueError, match="no adapter 'ml' over this model; it has sm, lm"):
        set_adapter(dense, "ml")
    with pytest.raises(ValueError, match="has an adapter 'sm' already"):
        load_adapter(dense, tmp_path / "sm", name="sm")


def test_base_tensors_are_shared(two: tuple[Any, dict[str | None, Any]]) -> None:
    dense, _ = two
    places = set()
    for name in ("sm", "lm", None):
        set_adapter(dense, name)
        places.add(tuple(dense.model.layers[2].mlp.get_submodule(p).weight.data_ptr() for p in ("fc1", "fc2")))
    assert len(places) == 1
    assert not hasattr(dense.config, "quantization_config")


def test_adapters_follow_a_cast(two: tuple[Any, dict[str | None, Any]]) -> None:
    dense, models = two
    half = copy.deepcopy(dense).to(torch.bfloat16).train()
    set_adapter(half, "sm")
    layer = moe_layers(half)["model.layers.2.mlp"]
    assert layer.router.weight.dtype == torch.float32
    assert layer.experts.deltas["fc1"].values_EN.dtype == torch.bfloat16
    assert layer.training
    assert logits(half).isfinite().all()
    dense.to(torch.float64)
    for name in ("sm", None, "lm"):
        set_adapter(dense, name)
        assert {p.dtype for p in dense.parameters()} == {torch.float64}
        torch.testing.assert_close(logits(dense), logits(models[name].double()), rtol=0, atol=0)


def test_removing(two: tuple[Any, dict[str | None, Any]], tmp_path: Path) -> None:
    dense, models = two
    remove_adapter(dense, "sm")
    assert torch.equal(logits(dense), logits(models["lm"]))
    remove_adapter(dense, "lm")
    assert torch.equal(logits(dense), logits(models[None]))
    assert adapters(dense) == []
    with pytest.raises(ValueError, match="no adapter 'lm' over this model"):
        remove_adapter(dense, "lm")
    with pytest.raises(ValueError, match="load one with load_adapter"):
        set_adapter(dense, "lm")
    load_adapter(dense, tmp_path / "sm")
    assert torch.equal(logits(dense), logits(models["sm"]))


def test_copies_and_further_training(two: tuple[Any, dict[str | None, Any]], tmp_path: Path) -> None:
    original, models = two
    dense = copy.deepcopy(original)
    set_adapter(dense, "sm")
    moe_layers(dense)["model.layers.0.mlp"].router.weight.data += 0.1
    save_adapter(dense, tmp_path / "more", parent=dense)
    load_adapter(original, tmp_path / "more", name="more")
    assert torch.equal(logits(original), logits(dense))
    set_adapter(original, "sm")
    assert torch.equal(logits(original), logits(models["sm"]))
    # Training that reached the shared tensors changed the parent itself: no adapter over it could be loaded again.
    dense.lm_head.weight.data += 0.1
    with pytest.raises(ValueError, match="trained or cast since its adapters were loaded"):
        save_adapter(dense, tmp_path / "lost", parent=dense)
