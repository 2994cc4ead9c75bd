import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ders
from ders.moe import moe_layers
from ders.upcycling import Upcycling, choose_layers

SM = functools.partial(ders.SparseDelta, sparsity=0.9)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("every_other", (0, 2, 4)),
        ("all", (0, 1, 2, 3, 4)),
        ("first_half", (0, 1)),
        ("second_half", (2, 3, 4)),
        ([3, 1], (1, 3)),
    ],
)
def test_layer_choices(layers: Any, chosen: tuple[int, ...]) -> None:
    assert choose_layers(layers, 5) == chosen


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("odd", "layers must be one of every_other, all, first_half, second_half"),
        ([0, 5], "from 0 to 4, for this model has 5 decoder layers"),
        ([-1], "from 0 to 4"),
        ([1, 1], "distinct"),
        ([], "chooses none"),
        (0, "or a list of indices: got 0"),
        (["a"], "or a list of indices"),
    ],
)
def test_bad_layer_choices(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_layers(layers, 5)


def test_only_the_chosen_layers_change(dense_model: Callable[..., Any]) -> None:
    model = dense_model()
    summary = ders.upcycle(model, delta=SM, layers=[1, 2])
    assert list(moe_layers(model)) == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert summary.upcycling.layers == (1, 2)


def test_it_reports_one_line(dense_model: Callable[..., Any]) -> None:
    line = str(ders.upcycle(dense_model(), delta=SM))
    per_layer = 4 * 3 * round(0.1 * 32 * 48) + 4 * 32
    assert line == (
        f"2 of 4 FFNs → 4 experts, top-2, SparseDelta sparsity 0.9: +{2 * per_layer:,} parameters "
        f"(vanilla +{2 * (3 * 3 * 32 * 48 + 4 * 32):,})"
    )


def test_an_error_leaves_the_model_as_it_was(dense_model: Callable[..., Any]) -> None:
    model = dense_model()
    with pytest.raises(ValueError, match="rank"):
        ders.upcycle(model, delta=functools.partial(ders.LowRankDelta, rank=33))
    assert not moe_layers(model)
    assert model.model.layers[0].mlp.gate_proj.weight is not None


def test_a_second_time_is_refused(dense_model: Callable[..., Any]) -> None:
    model = dense_model()
    ders.upcycle(model)
    with pytest.raises(ValueError, match="has MoE layers already"):
        ders.upcycle(model)


def test_a_delta_must_be_a_class_with_keywords() -> None:
    with pytest.raises(TypeError, match="expected a subclass of Delta"):
        ders.upcycle(_llama(), delta=lambda *a, **k: None)


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=7)
    )


def test_a_shared_configuration_stays_dense(dense_model: Callable[..., Any]) -> None:
    dense = dense_model()
    model = copy.copy(dense)
    config = dense.config
    ders.upcycle(model)
    assert not hasattr(config, "quantization_config")
    assert model.config.quantization_config["num_experts"] == 4


def test_no_two_matrices_share_positions_and_seeds_repeat(dense_model: Callable[..., Any]) -> None:
    first, second, other = dense_model(), dense_model(), dense_model()
    for model, seed in [(first, 0), (second, 0), (other, 1)]:
        ders.upcycle(model, delta=SM, seed=seed)
    seeds = [int(s) for n, b in first.named_buffers() if n.endswith("seeds_E") for s in b]
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 4
    drawn = [
        {n: t for n, t in m.state_dict().items() if "seeds_E" in n or "router" in n} for m in (first, second, other)
    ]
    assert all(torch.equal(drawn[0][n], drawn[1][n]) for n in drawn[0])
    assert not any(torch.equal(drawn[0][n], drawn[2][n]) for n in drawn[0])


def test_methods_of_one_seed_start_from_one_router(dense_model: Callable[..., Any]) -> None:
    vanilla, sparse = dense_model(), dense_model()
    ders.upcycle(vanilla, seed=4)
    ders.upcycle(sparse, delta=SM, seed=4)
    pairs = zip(moe_layers(vanilla).values(), moe_layers(sparse).values(), strict=True)
    assert all(torch.equal(a.router.weight, b.router.weight) for a, b in pairs)


def test_bf16_models_get_bf16_deltas_and_an_fp32_router(dense_model: Callable[..., Any]) -> None:
    model = dense_model().to(torch.bfloat16)
    ders.upcycle(model, delta=SM)
    layer = moe_layers(model)["model.layers.0.mlp"]
    assert {p.dtype for p in layer.experts.parameters()} == {torch.bfloat16}
    assert layer.router.weight.dtype == torch.float32
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


def test_it_fits_into_its_model(dense_model: Callable[..., Any]) -> None:
    import pickle

    model = dense_model()
    ders.upcycle(model, delta=SM, router=functools.partial(ders.TopKRouter, capacity_factor=0.1))
    assert not moe_layers(model)["model.layers.0.mlp"].training  # like the model it is in
    assert model.config is model.model.config
    copied = pickle.loads(pickle.dumps(model))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_upcycling_is_plain_data() -> None:
    import json

    upcycling = Upcycling(4, 2, (0, 2), delta={"name": "SparseDelta", "sparsity": 0.9}, universal=True, seed=3)
    assert Upcycling.from_section(json.loads(json.dumps(upcycling.to_section()))) == upcycling


def test_training_moves_every_part(dense_model: Callable[..., Any]) -> None:
    model = dense_model().train()
    ders.upcycle(model, delta=SM)
    ids = torch.randint(3, 60, (4, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    layer = moe_layers(model)["model.layers.0.mlp"]
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
