"""Experts that differ from their base in whole neurons."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ders
from ders.deltas import NeuronDelta
from ders.evaluation.layers import oracle
from ders.moe import SharedBaseMoE, moe_layers
from ders.upcycling import find_decoder


def layer_of(model: Any, neurons: int = 5) -> SharedBaseMoE:
    ders.upcycle(model, delta=neuron_delta(neurons), layers=[1], seed=3)
    (layer,) = moe_layers(model).values()
    assert isinstance(layer, SharedBaseMoE)
    torch.manual_seed(1)
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.double()


def neuron_delta(neurons: int) -> Any:
    return functools.partial(NeuronDelta, neurons=neurons)


def everything(layer: Any, run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(11, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    y = run(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("model_type", ["llama", "phi3", "phi", "gemma2"])
def test_a_layer_is_its_dense_experts(model_type: str, dense_model: Callable[..., Any]) -> None:
    layer = layer_of(dense_model(model_type))
    activation = getattr(layer, layer.form.activation)

    def dense(x: torch.Tensor) -> torch.Tensor:
        return oracle(layer, x, layer.router(x).top_k_index_TK, activation)

    torch.testing.assert_close(everything(layer, layer), everything(layer, dense), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_an_expert_differs_in_whole_neurons(model_type: str, dense_model: Callable[..., Any]) -> None:
    model = dense_model(model_type)
    dense_width = find_decoder(model)[1].config.intermediate_size
    layer = layer_of(model)
    for expert in range(4):
        moved = set()
        for name, delta in layer.experts.deltas.items():
            lines = delta.dense(expert).any(0 if name == layer.form.output else 1).nonzero().flatten()
            assert len(lines) == delta.values_EMX.shape[1]
            moved |= {int(line) % dense_width for line in lines}
        assert len(moved) == 5
    drawn = [tuple(n.tolist()) for n in layer.experts.deltas[layer.form.output].neurons_EN]
    assert len(set(drawn)) == 4


def test_matrices_with_neurons_of_their_own_are_right_too(dense_model: Callable[..., Any]) -> None:
    layer = layer_of(dense_model())
    together = layer(torch.randn(3, 32, dtype=torch.float64))
    layer.experts.deltas["up_proj"].load_state_dict(
        {**layer.experts.deltas["up_proj"].state_dict(), "seeds_E": torch.arange(4)}
    )

    def dense(x: torch.Tensor) -> torch.Tensor:
        return oracle(layer, x, layer.router(x).top_k_index_TK, layer.act_fn)

    torch.testing.assert_close(everything(layer, layer), everything(layer, dense), rtol=1e-10, atol=1e-10)
    assert together.shape == (3, 32)


def test_it_compiles(dense_model: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    layer, x = layer_of(dense_model()), torch.randn(1, 5, 32, dtype=torch.float64)
    whole: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x), layer(x))


@pytest.mark.parametrize("neurons", [0, -1, 49])
def test_neurons_out_of_range(neurons: int, dense_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="neurons must be between 1 and 48, the hidden width of the FFN"):
        ders.upcycle(dense_model(), delta=neuron_delta(neurons))


def test_half_precision_under_autocast(dense_model: Callable[..., Any]) -> None:
    layer = layer_of(dense_model()).float()
    x = torch.randn(9, 32)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1)
