"""The paper's rule against counts of really built models, tiny and random, of every method."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

import ders
from ders.accounting import formula
from ders.accounting.formula import Added, Architecture

SM = functools.partial(ders.SparseDelta, sparsity=0.9)
LM = functools.partial(ders.LowRankDelta, rank=3)
TRAINED: dict[str, Any] = {
    "ders_sm": (SM, functools.partial(formula.ders_sm, sparsity=0.9)),
    "ders_lm": (LM, functools.partial(formula.ders_lm, rank=3)),
}
# Their values are codes: what is no parameter of a module still counts.
COMPRESSED: dict[str, Any] = {
    "sparsify": (SM, functools.partial(formula.sparsify, sparsity=0.9)),
    "quantize": (functools.partial(ders.QuantizedDelta, bits=2), functools.partial(formula.quantize, bits=2)),
}
FAMILIES = ["llama", "phi", "phi3", "gpt_neox"]


def counted(model: Any, **upcycling: Any) -> tuple[Added, Architecture]:
    ders.upcycle(model, num_experts=3, **upcycling)
    counts = ders.count_parameters(model)
    added = Added(counts.added_params_paper, counts.added_params_universal)
    assert added.total == counts.added_params
    return added, Architecture.of(model)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("universal", [False, True])
def test_vanilla(dense_model: Callable[..., Any], model_type: str, universal: bool) -> None:
    added, architecture = counted(dense_model(model_type), universal=universal)
    assert formula.vanilla(architecture) == added


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize(("universal", "extended"), [(False, False), (True, False), (True, True)])
def test_trained_deltas(
    dense_model: Callable[..., Any], model_type: str, method: str, universal: bool, extended: bool
) -> None:
    delta, rule = TRAINED[method]
    added, architecture = counted(dense_model(model_type), delta=delta, universal=universal, extended=extended)
    assert rule(architecture, extended=extended) == added


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("method", COMPRESSED)
@pytest.mark.parametrize(("universal", "extended"), [(False, False), (True, False), (True, True)])
def test_compressed_deltas(
    dense_model: Callable[..., Any], model_type: str, method: str, universal: bool, extended: bool
) -> None:
    """The paper leaves out what a compressed model has beside its deltas: routers, and the biases of all but one."""
    delta, rule = COMPRESSED[method]
    added, a = counted(dense_model(model_type), delta=delta, universal=universal, extended=extended)
    left_out = a.routing_params + (a.num_experts - 1 + extended) * a.bias_params
    found = rule(a, extended=extended)
    assert (found.experts + left_out, found.universal) == (added.experts, added.universal)


def test_an_architecture_does_not_depend_on_the_method(dense_model: Callable[..., Any]) -> None:
    expected = Architecture(
        matrices=((48, 32), (32, 48)), biases=80, num_layers=2, num_experts=4, router_params=4 * 32, universal=True
    )
    for options in ({}, {"delta": SM}, {"delta": LM, "extended": True}):
        model = dense_model("phi")
        ders.upcycle(model, universal=True, **options)
        assert Architecture.of(model) == expected


def test_by_hand() -> None:
    """MoE-LLaVA-Phi at sparsity 0.9999, Table 1: deltas, three sets of biases, routers."""
    phi = Architecture(((10240, 2560), (2560, 10240)), 10240 + 2560, 16, 4, 2560 * 4)
    kept = round(2560 * 10240 / 10_000)
    assert formula.ders_sm(phi, 0.9999) == Added(16 * (4 * 2 * kept + 3 * 12800 + 10240))
    assert formula.ders_lm(phi, 1) == Added(16 * (4 * 2 * 12800 + 3 * 12800 + 10240))


def test_what_has_no_architecture(dense_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="this model has no MoE layers"):
        Architecture.of(dense_model())
    plain = Architecture(((48, 32),), 0, 1, 4, 128)
    with pytest.raises(ValueError, match="this architecture has none"):
        formula.ders_sm(plain, 0.5, extended=True)
