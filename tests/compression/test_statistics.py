"""The numbers of one projection, against slow ones in fp64."""

import itertools

import pytest
import torch
from torch import Tensor

import ders
from ders.compression import statistics


def slow_kurtosis(x: Tensor) -> float:
    centred = x - x.mean()
    return float(centred.pow(4).mean() / centred.pow(2).mean() ** 2)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_cosines_near_one_keep_their_digits(distance: float) -> None:
    torch.manual_seed(0)
    base = torch.randn(137, 1031)  # more than one block, and the last one shorter
    experts = [base + distance * torch.randn_like(base) for _ in range(3)]
    gram, sums = statistics.power_sums(base, experts)
    found = 1 - statistics.cosines(gram)
    everyone = [m.double() for m in (base, *experts)]
    for i, j in itertools.combinations(range(4), 2):
        a, b = (everyone[k] / everyone[k].norm() for k in (i, j))
        assert float(found[i, j]) == pytest.approx(float((a - b).square().sum()) / 2, rel=1e-3, abs=3e-16)
    assert statistics.kurtosis(sums[0], base.numel()) == pytest.approx(
        slow_kurtosis(everyone[1] - everyone[0]), rel=1e-5
    )


def test_a_matrix_of_zeros_has_no_direction() -> None:
    torch.manual_seed(0)
    base = torch.randn(8, 8)
    found = statistics.cosines(statistics.power_sums(base, [torch.zeros(8, 8), -base])[0])
    assert found[0].tolist() == pytest.approx([1, 0, -1])
    assert found[1].tolist() == [0, 1, 0]


def test_sketch_finds_what_the_full_spectrum_holds() -> None:
    torch.manual_seed(0)
    decaying = torch.randn(300, 12) @ (torch.randn(12, 211) * 0.7 ** torch.arange(12)[:, None])
    for delta in (decaying + 0.01 * torch.randn(300, 211), (decaying + 0.01 * torch.randn(300, 211)).T):
        sketch, full = (statistics.captured_energy(delta, full=full) for full in (False, True))
        assert sketch is not None
        assert full is not None
        assert len(sketch) == len(statistics.ranks(delta.shape, 64)) == 7
        assert sketch == pytest.approx(full[:7], rel=1e-3)
    flat = torch.randn(300, 211)
    sketch, full = (statistics.captured_energy(flat, full=full) for full in (False, True))
    assert sketch is not None
    assert full is not None
    assert all(0.8 * more < less <= more * (1 + 1e-5) for less, more in zip(sketch, full, strict=False))


def test_reconstruction_errors_are_those_of_the_deltas() -> None:
    torch.manual_seed(0)
    delta = torch.randn(40, 64) ** 3
    found = statistics.reconstruction_errors(delta)
    dials = {f"magnitude {p}": ders.SparseDelta(1, 40, 64, sparsity=p, selection="magnitude") for p in (0.5, 0.9, 0.99)}
    for bits in (8, 4, 2, 1):
        dials[f"uniform {bits}"] = ders.QuantizedDelta(1, 40, 64, bits=bits)
    dials["sign 1"] = ders.QuantizedDelta(1, 40, 64, bits=1, scheme="sign")
    assert found.keys() == dials.keys()
    for compression, compressed in dials.items():
        compressed.fit_expert_(0, delta)
        expected = float((compressed.dense(0).detach() - delta).norm() / delta.norm())
        assert found[compression] == pytest.approx(expected, rel=1e-4), compression


def test_sampled_errors_are_close() -> None:
    torch.manual_seed(0)
    delta = torch.randn(1000, 600)
    whole = delta.flatten().square().sort().values.double()
    found = statistics.reconstruction_errors(delta)
    assert found["magnitude 0.9"] == pytest.approx(float((whole[:540_000].sum() / whole.sum()).sqrt()), rel=0.01)
    assert found["sign 1"] == pytest.approx((1 - 2 / torch.pi) ** 0.5, rel=0.02)
