"""What every delta promises. Each `conf/method/*.yaml` with a delta is enrolled by listing the folder."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load, save

from ders.cli.build import instantiate
from ders.deltas import Delta

CONF = Path(__file__).resolve().parents[2] / "conf"
E, O, I, S = 3, 40, 56, 17


@functools.cache
def factory(method: str) -> Any:
    import os

    os.environ.setdefault("DERS_ROOT", str(CONF.parent))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=[f"method={method}"])
    found = instantiate(config.method)["delta"]
    # A tiny matrix keeps nothing at the paper's sparsity.
    if "sparsity" not in getattr(found, "keywords", {}):
        return found
    return functools.partial(found.func, **{**found.keywords, "sparsity": 0.97})


METHODS = [file.stem for file in sorted((CONF / "method").glob("*.yaml")) if factory(file.stem) is not None]


def trained(delta: Delta, scale: float = 0.1) -> Delta:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_(std=scale)
    return delta


@pytest.fixture(params=METHODS)
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
    slow = torch.einsum("soi,si->so", torch.stack([delta.dense(e) for e in range(E)])[expert], x)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(slow, inputs, upstream), rtol=1e-12, atol=1e-12
    )


def test_experts_differ(make: Any) -> None:
    delta = trained(make(E, O, I))
    assert not torch.equal(delta.dense(0), delta.dense(1))


def test_an_idle_expert_gets_a_zero_gradient_not_none(make: Any) -> None:
    delta = trained(make(E, O, I))
    delta(torch.randn(S, I), torch.zeros(S, dtype=torch.int64)).sum().backward()
    assert all(p.grad is not None for p in delta.parameters())


def test_fit_recovers_what_it_can_represent(make: Any) -> None:
    source = trained(make(E, O, I, seed=5).double())
    dense = torch.stack([source.dense(e) for e in range(E)]).detach()
    fitted = make(E, O, I, seed=5).double().fit_(dense)
    torch.testing.assert_close(torch.stack([fitted.dense(e) for e in range(E)]), dense)


def test_fit_comes_closer_than_nothing(make: Any) -> None:
    torch.manual_seed(0)
    target = torch.randn(E, O, I)
    fitted = make(E, O, I).fit_(target)
    error = sum((fitted.dense(e) - target[e]).square().sum() for e in range(E))
    assert error < target.square().sum()


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
    assert all(parameter.is_meta for parameter in delta.parameters())


def test_registered_under_its_name(make: Any) -> None:
    cls = make.func if isinstance(make, functools.partial) else make
    assert Delta.known[cls.__name__] is cls


def test_error_in_fp32(make: Any) -> None:
    delta = trained(make(E, O, I))
    x, expert = torch.randn(S, I), torch.randint(E, (S,))
    exact = copy.deepcopy(delta).double()(x.double(), expert)
    assert (delta(x, expert) - exact).norm() <= 1e-6 * exact.norm()
