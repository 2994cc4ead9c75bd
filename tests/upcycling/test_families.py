import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ders
import ders.moe
from ders.upcycling import FAMILIES, find_decoder
from ders.upcycling.families import hidden_side

METHODS: dict[str, Any] = {
    "vanilla": None,
    "ders_sm": functools.partial(ders.SparseDelta, sparsity=0.9),
    "ders_lm": functools.partial(ders.LowRankDelta, rank=2),
    "ders_neuron": functools.partial(ders.NeuronDelta, neurons=3),
}
INPUTS = {"input_ids": torch.tensor([[3, 7, 11, 19, 2, 5], [4, 4, 60, 33, 9, 1]])}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_step_0_certificate(model_type: str, method: str, dense_model: Callable[..., Any]) -> None:
    dense, model = dense_model(model_type), dense_model(model_type)
    summary = ders.upcycle(model, delta=METHODS[method])
    assert summary.model_type == model_type
    certificate = ders.certify(dense, model, **INPUTS)
    assert certificate.max_difference <= 1e-12
    assert certificate.against == "the dense model"


@pytest.mark.parametrize("model_type", ["llama", "phi", "phi3"])
@pytest.mark.parametrize(("top_k", "universal"), [(1, False), (1, True), (2, True)])
def test_certificate_of_routings_that_scale_by_design(
    model_type: str, top_k: int, universal: bool, dense_model: Callable[..., Any]
) -> None:
    dense, model = dense_model(model_type), dense_model(model_type)
    ders.upcycle(model, delta=METHODS["ders_sm"], top_k=top_k, universal=universal, layers="all")
    certificate = ders.certify(dense, model, **INPUTS)
    assert "4 FFN outputs multiplied by the sum of their gates" in str(certificate)
    plain = (model.double()(**INPUTS).logits - dense.double()(**INPUTS).logits).abs().max()
    assert plain > 1e-6  # without the factor they do differ


def test_certificate_refuses_another_parent(dense_model: Callable[..., Any]) -> None:
    dense, model = dense_model(), dense_model()
    ders.upcycle(model)
    dense.model.layers[1].mlp.up_proj.weight.data += 1e-3
    with pytest.raises(ValueError, match="differs from the dense model"):
        ders.certify(dense, model, **INPUTS)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2", "phi"])
def test_certificate_sees_what_fp32_norms_hide(model_type: str, dense_model: Callable[..., Any]) -> None:
    dense, model = dense_model(model_type), dense_model(model_type).double()
    ders.upcycle(model, delta=METHODS["ders_sm"])
    layer = next(iter(ders.moe.moe_layers(model).values()))
    layer.experts.deltas[layer.form.output].values_EN.data += 1e-9
    with pytest.raises(ValueError, match="differs from the dense model"):
        ders.certify(dense, model, **INPUTS)


def test_certificate_with_noise_and_drops(dense_model: Callable[..., Any]) -> None:
    dense, model = dense_model(), dense_model()
    router = functools.partial(ders.TopKRouter, second_choice_noise=True, eval_capacity_factor=0.5)
    ders.upcycle(model, router=router)
    assert "multiplied by the sum of their gates" in ders.certify(dense, model, **INPUTS).against


def test_certificate_of_a_llava(llava_model: Any) -> None:
    dense = copy.deepcopy(llava_model.model)
    summary = ders.upcycle(llava_model.model, delta=METHODS["ders_lm"])
    ids = torch.tensor([[1, *[4] * 4, 5, 6, 7]])
    assert summary.num_layers == 4
    ders.certify(dense, llava_model.model, input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16))


def test_the_bare_decoder_is_found_too(dense_model: Callable[..., Any]) -> None:
    assert find_decoder(dense_model().model)[0] == ""


def test_unknown_family_is_refused_by_name() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11))
    with pytest.raises(ValueError, match=r"no decoder of a known family in GPT2LMHeadModel \(gpt2\)"):
        ders.upcycle(model)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_hidden_side_of_every_matrix(model_type: str, dense_model: Callable[..., Any]) -> None:
    _, decoder, family = find_decoder(dense_model(model_type))
    ffn = getattr(getattr(decoder, family.layers)[0], family.mlp)
    for name, linear in family.ffn.linears(ffn).items():
        side, blocks = hidden_side(name)
        expected = (48 * blocks, 32) if side == "rows" else (32, 48)
        assert linear.weight.shape == expected
    with pytest.raises(ValueError, match="no known family has a projection 'proj'"):
        hidden_side("proj")
