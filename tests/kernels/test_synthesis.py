"""Products with W + Δ_e against the oracle that builds every matrix."""

import pytest
import torch

from ders.deltas import QuantizedDelta, SparseDelta
from ders.kernels import synthesis
from ders.kernels.forms import Coded, Form, LowRank, Sparse
from ders.kernels.native import library
from ders.kernels.synthesis import synthesized_linear, synthesized_linear_oracle

COUNTS = [[3, 0, 6, 1], [0, 0, 0, 0], [40, 1, 33, 70]]
FORMS = ["sparse", "dense", "low rank", "1 bit", "2 bits a row", "3 bits", "4 bits a group", "8 bits a row"]


def make(kind: str, experts: int, out_features: int, in_features: int, dtype: torch.dtype = torch.float64) -> Form:
    torch.manual_seed(1)
    size = (experts, out_features, in_features)
    if kind in ("sparse", "dense"):
        delta = SparseDelta(*size, sparsity=0.7 if kind == "sparse" else 0.0, seed=2)
        columns, starts = delta._derive()
        return Sparse(torch.randn(delta.values_EN.shape, dtype=dtype), columns, starts)
    if kind == "low rank":
        return LowRank(
            torch.randn(experts, 2, in_features, dtype=dtype), torch.randn(experts, out_features, 2, dtype=dtype)
        )
    words = kind.split()
    granularity = words[-1] if len(words) > 2 else "tensor"
    group = {"group_size": in_features // 4} if granularity == "group" else {}
    quantized = QuantizedDelta(*size, bits=int(words[0]), granularity=granularity, **group)
    quantized.fit_(torch.randn(size))
    return Coded(quantized.codes_EOB, quantized.bits, *quantized._grids(torch.float32))


def differentiable(form: Form) -> list[torch.Tensor]:
    return {Sparse: [form[0]], LowRank: list(form[:2]), Coded: []}[type(form)]


def with_leaves(form: Form) -> Form:
    leaves = [t.clone().requires_grad_() for t in differentiable(form)]
    return type(form)(*leaves, *form[len(leaves) :])


def compare(kind: str, counts: list[int], out_features: int, in_features: int) -> None:
    form, weight = make(kind, len(counts), out_features, in_features), torch.randn(out_features, in_features).double()
    x = torch.randn(sum(counts), in_features, dtype=torch.float64)
    upstream = torch.randn(sum(counts), out_features, dtype=torch.float64)
    results = []
    for function in (synthesized_linear, synthesized_linear_oracle):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_(), with_leaves(form)
        y = function(leaves[0], torch.tensor(counts), *leaves[1:])
        y.backward(upstream)
        results.append([y.detach()] + [t.grad for t in (*leaves[:2], *differentiable(leaves[2]))])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("out_features", "in_features"), [(7, 20), (1, 64), (33, 36)])
def test_values_and_gradients_match_the_oracle(
    kind: str, counts: list[int], out_features: int, in_features: int
) -> None:
    compare(kind, counts, out_features, in_features)


@pytest.mark.parametrize("kind", FORMS)
def test_in_small_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "BLOCK", 100)
    monkeypatch.setattr(synthesis, "FEW", 0)
    compare(kind, [3, 0, 6, 1], 33, 36)


@pytest.mark.parametrize("kind", FORMS)
def test_without_a_compiler(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library", lambda: None)
    compare(kind, [3, 0, 6, 1], 33, 36)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", ["sparse", "2 bits a row", "8 bits a row"])
@pytest.mark.parametrize("few", [0, 1000])
def test_narrow_types(
    kind: str, dtype: torch.dtype, tolerance: float, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass and in blocks, for one slot of an expert and for many."""
    monkeypatch.setattr(synthesis, "FEW", few)
    counts, form = torch.tensor([1, 0, 7, 60]), make(kind, 4, 70, 80, torch.float32)
    narrow = type(form)(*(t.to(dtype) for t in differentiable(form)), *form[len(differentiable(form)) :])
    x, weight = torch.randn(68, 80, dtype=dtype), torch.randn(70, 80, dtype=dtype)
    exact = type(form)(*(t.double() for t in differentiable(narrow)), *narrow[len(differentiable(narrow)) :])
    found = synthesized_linear(x, counts, weight, narrow)
    expected = synthesized_linear_oracle(x.double(), counts, weight.double(), exact)
    assert found.dtype == dtype
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_gradcheck() -> None:
    counts, form = torch.tensor([2, 0, 3]), make("sparse", 3, 4, 6)
    x, weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, form[0])]
    assert torch.autograd.gradcheck(
        lambda x, weight, values: synthesized_linear(x, counts, weight, Sparse(values, *form[1:3])), leaves
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sparse", "2 bits a row"])
def test_compiles_as_one_graph(kind: str) -> None:
    counts, form, weight = torch.tensor([2, 0, 3]), make(kind, 3, 7, 12), torch.randn(7, 12).double()
    x = torch.randn(5, 12).double()
    grads = []
    for function in (synthesized_linear, torch.compile(synthesized_linear, fullgraph=True)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        function(leaves[0], counts, leaves[1], form).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[0], grads[1])
