import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ders
from ders.deltas import Delta, LowRankDelta, QuantizedDelta, SparseDelta
from ders.moe import FFN, SharedBaseMoE, TopKRouter, VanillaMoE
from ders.moe.execution import Work, mixing_pays, synthesis_pays

FORM = FFN(("gate_proj", "up_proj"), "down_proj", "act_fn")
DELTAS: dict[str, Callable[..., Delta]] = {
    "thin": functools.partial(SparseDelta, sparsity=0.998),
    "thick": functools.partial(SparseDelta, sparsity=0.5),
    "low_rank": functools.partial(LowRankDelta, rank=2),
    "codes": functools.partial(QuantizedDelta, bits=2),
}


class Dense(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=bias)
        self.act_fn = nn.SiLU()


def layer(kind: str, *, bias: bool = False, width: int = 20, hidden: int = 36) -> SharedBaseMoE:
    torch.manual_seed(0)
    made = iter(range(3))

    def make(name: str, experts: int, out_features: int, in_features: int) -> Delta:
        delta = DELTAS[kind](experts, out_features, in_features, seed=next(made))
        delta.fit_(torch.randn(experts, out_features, in_features) * 0.1)
        return delta

    built = SharedBaseMoE(Dense(width, hidden, bias), FORM, TopKRouter(width, 4, 2), make)
    for bias_EO in built.experts.biases_EO.values():
        nn.init.normal_(bias_EO)
    return built.double()


def everything(layer: nn.Module, tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, tokens, 20, generator=generator, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    return [y, *grads]


@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", DELTAS)
def test_all_ways_give_the_same(kind: str, bias: bool, tokens: int) -> None:
    found = []
    for execution in ("auto", "shared", "synthesize"):
        one = layer(kind, bias=bias)
        assert ders.set_execution(one, execution) == 1
        found.append(everything(one, tokens))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[2], found[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", DELTAS)
def test_a_whole_layer_compiles(kind: str) -> None:
    torch._dynamo.reset()
    one = layer(kind)
    x = torch.randn(1, 5, 20, dtype=torch.float64)
    whole: Any = torch.compile(one, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x), one(x))


def test_a_layer_keeps_less_than_its_dense_ffn() -> None:
    def kept(module: nn.Module) -> int:
        parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(1, 300, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x)
        return sum(held.values())

    dense = Dense(64, 512, bias=False)
    dense.forward = lambda x: dense.down_proj(dense.act_fn(dense.gate_proj(x)) * dense.up_proj(x))  # type: ignore[method-assign]
    thin = layer("thin", width=64, hidden=512).float()
    assert kept(thin) <= 1.1 * kept(dense)


def test_the_choice_follows_the_work() -> None:
    def work(tokens: int) -> Work:
        return Work(tokens, top_k=2, num_experts=4, projections=[(5632, 2048), (5632, 2048), (2048, 5632)])

    with torch.device("meta"):
        shapes = work(1).projections
        thin, thick, dense_sparse = (
            [SparseDelta(4, *shape, sparsity=sparsity) for shape in shapes] for sparsity in (0.9999, 0.9, 0.3)
        )
        codes = [QuantizedDelta(4, *shape, bits=2) for shape in shapes]
    forms = {
        name: [ders.kernels.Sparse(d.values_EN, d.values_EN, d.values_EN) for d in deltas]
        for name, deltas in {"thin": thin, "thick": thick, "dense": dense_sparse}.items()
    }
    forms["codes"] = [delta.form() for delta in codes]
    assert all(
        mixing_pays(work(t), forms["thin"]) and not synthesis_pays(work(t), forms["thin"]) for t in (1, 16, 4096)
    )
    assert not mixing_pays(work(256), forms["thick"])
    assert not synthesis_pays(work(1), forms["codes"])
    assert synthesis_pays(work(4096), forms["codes"])
    assert synthesis_pays(work(4096), forms["dense"])


def test_unknown_ways_are_refused_and_vanilla_has_none() -> None:
    with pytest.raises(ValueError, match=r"execution must be one of auto, shared, synthesize: got 'fast'"):
        ders.set_execution(layer("thin"), "fast")
    assert ders.set_execution(VanillaMoE(Dense(20, 36, False), FORM, TopKRouter(20, 4, 2)), "shared") == 0
