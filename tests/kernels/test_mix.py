import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ders.deltas import Delta, LowRankByLoadDelta, LowRankDelta, SparseDelta, ZeroDelta
from ders.kernels import ACTIVATIONS, can_mix, mix, mix_experts, mix_experts_oracle, name_activation
from ders.kernels.native import library

native = pytest.mark.skipif(library.library() is None, reason="no C++ compiler here")


def uneven(*shape: int, seed: int) -> Delta:
    delta = LowRankByLoadDelta(*shape, rank=3, seed=seed)
    delta.allot_(torch.tensor([5, 1, 0]))
    return delta


KINDS: dict[str, Callable[..., Delta]] = {
    "sparse": functools.partial(SparseDelta, sparsity=0.7),
    "thin": functools.partial(SparseDelta, sparsity=0.98),
    "low_rank": functools.partial(LowRankDelta, rank=3),
    "rank_1": functools.partial(LowRankDelta, rank=1),
    "uneven": uneven,
    "none": ZeroDelta,
}
# Input projections by their columns (in hidden widths), and whether the first half or projection gates the other.
LAYOUTS = {"gate_and_up": ([1, 1], True), "fused": ([2], True), "plain": ([1], False)}


class Case:
    """Leaves of one layer's middle, and its oracle's matrices from the same leaves."""

    def __init__(
        self,
        kind: str,
        layout: str,
        *,
        tokens: int = 7,
        hidden: int = 14,
        biases: bool = True,
        dtype: Any = torch.float64,
    ) -> None:
        torch.manual_seed(0)
        experts, width, top_k = 3, 10, 2
        columns, self.gated = LAYOUTS[layout]
        shapes = [*((count * hidden, width) for count in columns), (width - 1, hidden)]
        self.index = torch.rand(tokens, experts).argsort(1)[:, :top_k]
        self.deltas = [KINDS[kind](experts, *shape, seed=j).to(dtype) for j, shape in enumerate(shapes)]
        for delta in self.deltas:
            for parameter in delta.parameters():
                nn.init.normal_(parameter)
        self.x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
        self.pre = [torch.randn(tokens, o, dtype=dtype, requires_grad=True) for o, _ in shapes[:-1]]
        self.biases = [torch.randn(experts, o, dtype=dtype, requires_grad=True) for o, _ in shapes[:-1] if biases]
        gates = torch.rand(tokens, top_k, dtype=dtype)
        gates[0, 1] = 0  # dropped
        self.gates = gates.requires_grad_()
        self.leaves = [self.x, self.gates, *self.pre, *self.biases, *(p for d in self.deltas for p in d.parameters())]

    def fast(self, activation: str) -> tuple[Tensor, Tensor]:
        forms = [delta.form() for delta in self.deltas]
        return mix_experts(
            self.x, self.pre, self.index, self.gates, [f for f in forms if f], self.biases, activation, self.gated
        )

    def slow(self, activation: str) -> tuple[Tensor, Tensor]:
        matrices = [torch.stack([self._matrix(delta, e) for e in range(3)]) for delta in self.deltas]
        return mix_experts_oracle(
            self.x, self.pre, self.index, self.gates, matrices, self.biases, activation, self.gated
        )

    def _matrix(self, delta: Delta, expert: int) -> Tensor:
        return delta.dense(expert).to(self.x.dtype)

    def with_gradients(self, outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        # Exact in every type, so that rounded and exact runs start from the same.
        upstream = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, self.leaves, upstream)]


def relative_errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    pairs = zip(found, expected, strict=True)
    wide = [(a.detach().double(), b.detach().double()) for a, b in pairs if b.numel()]
    return [((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in wide]


@native
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_all_gradients_match_the_oracle(kind: str, layout: str, activation: str) -> None:
    case = Case(kind, layout)
    errors = relative_errors(case.with_gradients(case.fast(activation)), case.with_gradients(case.slow(activation)))
    assert max(errors) < 1e-12


@native
@pytest.mark.parametrize(("tokens", "hidden", "biases"), [(1, 3, False), (5, 513, True), (33, 1030, False)])
@pytest.mark.parametrize("kind", ["thin", "rank_1"])
def test_odd_sizes_and_many_pieces(kind: str, tokens: int, hidden: int, biases: bool) -> None:
    case = Case(kind, "gate_and_up", tokens=tokens, hidden=hidden, biases=biases)
    errors = relative_errors(case.with_gradients(case.fast("silu")), case.with_gradients(case.slow("silu")))
    assert max(errors) < 1e-12


@native
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_rounding_stays_that_of_the_type(kind: str, activation: str, dtype: torch.dtype, limit: float) -> None:
    exact, rounded = Case(kind, "gate_and_up", hidden=700), Case(kind, "gate_and_up", hidden=700, dtype=dtype)
    for a, b in zip(exact.leaves, rounded.leaves, strict=True):
        a.data.copy_(b.data)
    found = rounded.with_gradients(rounded.fast(activation))
    assert max(relative_errors(found, exact.with_gradients(exact.slow(activation)))) < limit


@native
@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_gradcheck(kind: str) -> None:
    case = Case(kind, "fused", tokens=3, hidden=4)
    assert torch.autograd.gradcheck(lambda *leaves: case.fast("gelu"), case.leaves)


@native
def test_without_gradients_and_threads_change_nothing() -> None:
    case = Case("thin", "gate_and_up", tokens=40)
    with_grad = case.fast("silu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(case.fast("silu"), with_grad, strict=True))
    finally:
        torch.set_num_threads(before)


@native
def test_it_compiles_whole() -> None:
    case = Case("thin", "gate_and_up")
    whole = torch.compile(case.fast, fullgraph=True, backend="aot_eager")
    errors = relative_errors(case.with_gradients(whole("silu")), case.with_gradients(case.fast("silu")))
    assert max(errors) < 1e-12


def test_activations_are_known_by_what_they_do() -> None:
    known = [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.functional.silu]
    assert [name_activation(f) for f in known] == ["silu", "gelu", "gelu_tanh", "relu", "silu"]
    assert name_activation(nn.Tanh()) is None
    assert name_activation(nn.PReLU()) is None


def test_what_cannot_be_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, low_rank = (KINDS[kind](2, 5, 4).form() for kind in ("sparse", "low_rank"))
    assert not can_mix("cpu", torch.float32, [sparse, low_rank], "silu")
    assert not can_mix("cpu", torch.float32, [sparse, None], "silu")
    assert not can_mix("cpu", torch.float32, [sparse, sparse], None)
    assert not can_mix("meta", torch.float32, [sparse, sparse], "silu")
    monkeypatch.setattr(library, "library", lambda: None)
    assert not mix.can_mix("cpu", torch.float32, [sparse, sparse], "silu")
