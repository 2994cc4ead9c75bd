import pytest
import torch

from ders.kernels import (
    centred_grid,
    dequantize,
    quantization,
    quantize,
    quantized_linear,
    quantized_linear_oracle,
    unpack,
)
from ders.kernels.native import library

CASES = [
    # slots, experts, out, in, bits, groups per matrix
    (13, 3, 7, 12, 2, 7),
    (1, 4, 5, 9, 1, 1),
    (8, 2, 1, 16, 3, 4),
    (5, 2, 6, 10, 4, 12),
    (9, 5, 4, 6, 8, 4),
]


def matrices(experts: int, out_features: int, in_features: int, bits: int, groups: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    parts = [quantize(torch.randn(out_features, in_features), bits, groups, "uniform", False) for _ in range(experts)]
    codes, lows, steps = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    return codes, lows, steps


@pytest.mark.parametrize(("slots", "experts", "out_features", "in_features", "bits", "groups"), CASES)
def test_product_and_gradient_match_the_oracle(
    slots: int, experts: int, out_features: int, in_features: int, bits: int, groups: int
) -> None:
    codes, lows, steps = matrices(experts, out_features, in_features, bits, groups)
    x = torch.randn(slots, in_features, dtype=torch.float64)
    upstream = torch.randn(slots, out_features, dtype=torch.float64)
    expert = torch.randint(experts, (slots,))
    results = []
    for function in (quantized_linear, quantized_linear_oracle):
        x_SI = x.clone().requires_grad_()
        y_SO = function(x_SI, expert, codes, bits, lows, steps)
        y_SO.backward(upstream)
        results.append((y_SO.detach(), x_SI.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("slots", [0, 1, 6, 20, 150])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 37, 37 * 3])
def test_any_number_of_slots(slots: int, bits: int, groups: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass and in blocks; grids of 16 columns and more, and rows that end within a vector."""
    monkeypatch.setattr(quantization, "FEW", few)
    codes, lows, steps = matrices(3, 37, 48 if groups > 37 else 45, bits, groups)
    x = torch.randn(slots, 48 if groups > 37 else 45, dtype=torch.float64)
    upstream, expert = torch.randn(slots, 37, dtype=torch.float64), 2 * torch.randint(2, (slots,))
    results = []
    for function in (quantized_linear, quantized_linear_oracle):
        x_SI = x.clone().requires_grad_()
        y_SO = function(x_SI, expert, codes, bits, lows, steps)
        y_SO.backward(upstream)
        results.append((y_SO.detach(), x_SI.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("slots", [3, 20, 300])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_narrow_types(
    slots: int, bits: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64 takes the portable way to the values of codes, the others that of the machine."""
    monkeypatch.setattr(quantization, "FEW", 1000)
    codes, lows, steps = matrices(3, 37, 48, bits, 37)
    x, expert = torch.randn(slots, 48, dtype=dtype), torch.randint(3, (slots,))
    found = quantized_linear(x, expert, codes, bits, lows, steps)
    expected = quantized_linear_oracle(x.double(), expert, codes, bits, lows, steps)
    assert found.dtype == dtype
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, lows, steps = matrices(3, 7, 12, 2, 7)
    x, expert = torch.randn(13, 12, dtype=torch.float64), torch.randint(3, (13,))
    native = quantized_linear(x, expert, codes, 2, lows, steps)
    monkeypatch.setattr(library, "library", lambda: None)
    torch.testing.assert_close(quantized_linear(x, expert, codes, 2, lows, steps), native, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    codes, lows, steps = matrices(3, 7, 12, 2, 7)
    x, expert = torch.randn(5, 12), torch.randint(3, (5,))
    compiled = torch.compile(quantized_linear, fullgraph=True)
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    for function, leaf in zip((compiled, quantized_linear), leaves, strict=True):
        function(leaf, expert, codes, 2, lows, steps).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_gradcheck() -> None:
    codes, lows, steps = matrices(2, 3, 8, 2, 3)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    expert = torch.tensor([0, 1, 1, 0])
    assert torch.autograd.gradcheck(lambda x: quantized_linear(x, expert, codes, 2, lows, steps), (x,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_same() -> None:
    codes, lows, steps = matrices(3, 64, 96, 2, 64)
    x, expert = torch.randn(9, 96), torch.randint(3, (9,))
    there = quantized_linear(*(t.cuda() for t in (x, expert, codes)), 2, lows.cuda(), steps.cuda())
    torch.testing.assert_close(there.cpu(), quantized_linear(x, expert, codes, 2, lows, steps))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(33, 24)
    for groups in (1, 33, 99):
        at_once = quantize(x, 3, groups, "uniform", False)
        monkeypatch.setattr(quantization, "BLOCK", 100)
        in_blocks = quantize(x, 3, groups, "uniform", False)
        monkeypatch.undo()
        assert all(torch.equal(a, b) for a, b in zip(at_once, in_blocks, strict=True))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("groups", [1, 5, 20])
def test_every_weight_goes_to_its_nearest_point(bits: int, symmetric: bool, groups: int) -> None:
    """Against an oracle that tries every point of the grid."""
    torch.manual_seed(0)
    x = torch.randn(5, 16)
    codes, lows, steps = quantize(x, bits, groups, "uniform", symmetric)
    points_GL = lows.double()[:, None] + torch.arange(2**bits) * steps.double()[:, None]
    distance = (x.double().view(groups, -1, 1) - points_GL[:, None, :]).abs()
    found = unpack(codes, bits, 16).view(groups, -1, 1).long()
    torch.testing.assert_close(distance.gather(2, found)[..., 0], distance.amin(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        dequantize(codes, bits, 16, lows.double(), steps.double()).view(groups, -1),
        points_GL.gather(1, found[..., 0]),
    )


def test_sign_is_the_best_single_scale() -> None:
    x = torch.randn(4, 50)
    codes, lows, steps = quantize(x, 1, 4, "sign", False)
    fitted = dequantize(codes, 1, 50, lows.float(), steps.float())
    best = x.sign() * x.abs().mean(1, keepdim=True)
    torch.testing.assert_close(fitted, best, rtol=1e-2, atol=0)
    assert torch.equal(centred_grid(steps, 1)[0], lows)


def test_a_constant_group_is_kept() -> None:
    x = torch.full((2, 8), 0.5)
    codes, lows, steps = quantize(x, 2, 2, "uniform", False)
    assert torch.equal(dequantize(codes, 2, 8, lows.float(), steps.float()), x)
