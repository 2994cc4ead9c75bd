"""What every delta promises.

Each `conf/method/*.yaml` and `conf/compression/*.yaml` with a delta is enrolled by listing the folders, and every
scheme of the forms that have several.
"""

import copy
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load, save

from ders.cli.build import instantiate
from ders.deltas import Delta, QuantizedDelta, ZeroDelta

CONF = Path(__file__).resolve().parents[2] / "conf"
E, O, I, S = 3, 40, 56, 17


@functools.cache
def factory(overrides: str) -> Any:
    os.environ.setdefault("DERS_ROOT", str(CONF.parent))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=overrides.split())
    found = instantiate(config.get("compression") or config.method)["delta"]
    # A tiny matrix keeps nothing at the paper's sparsity.
    if getattr(found, "keywords", {}).get("sparsity", 0) <= 0.97:
        return found
    return functools.partial(found.func, **{**found.keywords, "sparsity": 0.97})


def listed(group: str) -> list[str]:
    return [f"{group}={file.stem}" for file in sorted((CONF / group).glob("*.yaml"))]


TRAINED = [method for method in listed("method") if factory(method) is not None]
FITTED = [f"method=vanilla {compression}" for compression in listed("compression")]
VARIANTS = [
    f"method=vanilla compression={line}"
    for line in [
        "sparsify selection=magnitude rescale=false",
        "sparsify selection=magnitude sparsity=0.3",
        "sparsify sparsity=0 rescale=false",
        "sparsify sparsity=0.5 rescale=false values_bits=4",
        "sparsify selection=magnitude rescale=false values_bits=3",
        *(f"quantize bits={bits}" for bits in (1, 3, 4, 8)),
        "quantize bits=2 symmetric=true",
        "quantize bits=1 scheme=sign",
        "quantize bits=1 scheme=sign granularity=tensor",
        "quantize bits=3 granularity=tensor",
        "quantize bits=4 granularity=group group_size=8",
    ]
]


def trained(delta: Delta, scale: float = 0.1) -> Delta:
    """As after training; forms that are not trained are fitted to something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_(std=scale)
    if not list(delta.parameters()):
        delta.fit_(torch.randn(E, O, I) * scale)
    return delta


def dense(delta: Delta) -> torch.Tensor:
    return torch.stack([delta.dense(e) for e in range(E)])


@pytest.fixture(params=[*TRAINED, *FITTED, *VARIANTS])
def make(request: pytest.FixtureRequest) -> Any:
    return factory(request.param)


def test_born_zero(make: Any) -> None:
    delta = make(E, O, I)
    x, expert = torch.randn(S, I), torch.randint(E, (S,))
    assert not any(delta.dense(e).any() for e in range(E))
    assert not delta(x, expert).any()


def test_forward_is_the_dense_delta(make: Any) -> None:
    delta = trained(make(E, O, I).double())
    x, expert = torch.randn(S, I, dtype=torch.float64, requires_grad=True), torch.randint(E, (S,))
    upstream = torch.randn(S, O, dtype=torch.float64)
    inputs = [x, *delta.parameters()]
    fast = delta(x, expert)
    slow = torch.einsum("soi,si->so", dense(delta).double()[expert], x)
    # Forms of packed codes build their oracle in fp32.
    tolerance = 1e-12 if delta.dense(0).dtype == torch.float64 else 1e-6
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    if not isinstance(delta, ZeroDelta):
        gradients = [torch.autograd.grad(y, inputs, upstream) for y in (fast, slow)]
        torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_experts_differ(make: Any) -> None:
    delta = trained(make(E, O, I))
    if isinstance(delta, ZeroDelta):
        return
    assert not torch.equal(delta.dense(0), delta.dense(1))


def test_an_idle_expert_gets_a_zero_gradient_not_none(make: Any) -> None:
    delta = trained(make(E, O, I))
    y = delta(torch.randn(S, I, requires_grad=True), torch.zeros(S, dtype=torch.int64))
    if isinstance(delta, ZeroDelta):
        return
    y.sum().backward()
    assert all(p.grad is not None for p in delta.parameters())


def test_fit_recovers_what_it_can_represent(make: Any) -> None:
    source = trained(make(E, O, I, seed=5).double())
    fitted = make(E, O, I, seed=5).double().fit_(dense(source).detach())
    factor = 1 / (1 - source.sparsity) if getattr(source, "rescale", False) else 1
    # A grid's ends may move by a rounding of its step.
    step = float(source.steps_EG.max()) if isinstance(source, QuantizedDelta) else 0.0
    torch.testing.assert_close(dense(fitted), dense(source) * factor, rtol=1e-5, atol=1e-5 + step)


def test_fit_comes_closer_than_nothing(make: Any) -> None:
    torch.manual_seed(0)
    target = torch.randn(E, O, I)
    fitted = make(E, O, I).fit_(target)
    error, nothing = (dense(fitted) - target).square().sum(), target.square().sum()
    if isinstance(fitted, ZeroDelta):
        assert error == nothing
    elif getattr(fitted, "rescale", False):  # unbiased instead, at the price of its error
        kept = dense(fitted) != 0
        torch.testing.assert_close(dense(fitted)[kept], (target / (1 - fitted.sparsity))[kept])
    elif isinstance(fitted, QuantizedDelta) and fitted.scheme == "uniform":
        # Half a step and the rounding of the grid itself; at 1 bit that is more than no delta at all would err.
        steps = fitted.steps_EG.float().repeat_interleave(target[0].numel() // fitted.steps_EG.shape[1], dim=1)
        assert ((dense(fitted) - target).abs().flatten(1) <= 0.5 * steps + 0.01 * target.abs().max()).all()
        assert (error > nothing) == (fitted.bits == 1)
    else:
        assert error < nothing


def test_fitting_one_expert_leaves_the_others(make: Any) -> None:
    torch.manual_seed(0)
    target = torch.randn(E, O, I)
    at_once, one_by_one = make(E, O, I).fit_(target), make(E, O, I)
    one_by_one.fit_expert_(1, target[1])
    assert torch.equal(one_by_one.dense(1), at_once.dense(1))
    assert not one_by_one.dense(0).any()
    one_by_one.fit_expert_(0, target[0])
    one_by_one.fit_expert_(2, target[2])
    assert torch.equal(dense(one_by_one), dense(at_once))


def test_counted_bits_are_written_bytes(make: Any) -> None:
    delta = trained(make(E, O, I)).to(torch.bfloat16)
    file = save({name: tensor.contiguous() for name, tensor in delta.state_dict().items()})
    header = 8 + int.from_bytes(file[:8], "little")
    assert delta.storage_bits() == 8 * (len(file) - header)


def test_a_file_tells_all_though_it_was_built_with_another_seed(make: Any) -> None:
    delta = trained(make(E, O, I, seed=1))
    other = make(E, O, I, seed=2)
    other.load_state_dict(load(save(delta.state_dict())))
    x, expert = torch.randn(S, I), torch.randint(E, (S,))
    assert torch.equal(delta(x, expert), other(x, expert))


def test_seed_alone_decides(make: Any) -> None:
    first, same, other = (make(E, O, I, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    zero = all(not tensor.any() for tensor in first.values())  # a form that draws nothing
    assert zero or not all(torch.equal(first[name], other[name]) for name in first)


def test_copies_and_casts(make: Any) -> None:
    delta = trained(make(E, O, I))
    x, expert = torch.randn(S, I), torch.randint(E, (S,))
    assert torch.equal(copy.deepcopy(delta)(x, expert), delta(x, expert))
    half = copy.deepcopy(delta).to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16(), expert).float(), delta(x, expert), rtol=0.1, atol=0.1)


def test_shapes_alone_on_the_meta_device(make: Any) -> None:
    with torch.device("meta"):
        delta = make(E, O, I)
    assert all(tensor.is_meta for tensor in delta.state_dict().values())


def test_registered_under_its_name(make: Any) -> None:
    cls = make.func if isinstance(make, functools.partial) else make
    assert Delta.known[cls.__name__] is cls


def test_error_in_fp32(make: Any) -> None:
    delta = trained(make(E, O, I))
    x, expert = torch.randn(S, I), torch.randint(E, (S,))
    exact = copy.deepcopy(delta).double()(x.double(), expert)
    assert (delta(x, expert) - exact).norm() <= 1e-6 * exact.norm()
