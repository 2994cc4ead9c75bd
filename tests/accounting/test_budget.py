"""The mildest setting that fits: against trying every one."""

import functools
from typing import Any

import pytest
import torch

import ders
from ders.accounting.budget import delta_bytes, dial_of, mildest, settings

MATRICES = [(24, 10), (10, 24)]
FORMS: dict[str, Any] = {
    "rank": functools.partial(ders.LowRankDelta, rank=1),
    "bits": functools.partial(ders.QuantizedDelta, bits=8),
    "sign": functools.partial(ders.QuantizedDelta, bits=1, scheme="sign"),
    "sparsity": functools.partial(ders.SparseDelta, sparsity=0.5),
    "magnitude": functools.partial(ders.SparseDelta, sparsity=0.5, selection="magnitude"),
}


def size(delta: Any) -> int:
    return delta_bytes(delta, 3, MATRICES, torch.bfloat16)


def test_bytes_by_hand() -> None:
    assert size(FORMS["rank"]) == 2 * 3 * 2 * 34
    assert size(FORMS["sparsity"]) == 2 * 3 * (2 * 120 + 8)
    assert size(FORMS["sign"]) == 3 * (24 * 2 + 10 * 3 + 2 * 34)


@pytest.mark.parametrize("form", ["rank", "bits", "sign"])
@pytest.mark.parametrize("budget", [250, 900, 2000, 10**6])
def test_of_few_settings_the_mildest_that_fits(form: str, budget: int) -> None:
    delta = FORMS[form]
    dial = dial_of(delta)
    tried = [functools.partial(delta.func, **(delta.keywords | {dial: s})) for s in settings(delta, MATRICES)]
    fitting = [one for one in tried if size(one) <= budget]
    if not fitting:
        with pytest.raises(ValueError, match=f"does not fit: even {dial}=1 takes"):
            mildest(delta, MATRICES, size, size, budget)
        return
    assert mildest(delta, MATRICES, size, size, budget).keywords == fitting[0].keywords


@pytest.mark.parametrize("form", ["sparsity", "magnitude"])
@pytest.mark.parametrize("budget", [120, 300, 700])
def test_the_lowest_sparsity_to_six_digits(form: str, budget: int) -> None:
    delta = FORMS[form]
    found = mildest(delta, MATRICES, size, size, budget)
    assert size(found) <= budget
    milder = functools.partial(delta.func, **(delta.keywords | {"sparsity": found.keywords["sparsity"] - 1e-6}))
    assert size(milder) > budget
    assert found.keywords.items() >= {k: v for k, v in delta.keywords.items() if k != "sparsity"}.items()


def test_the_harshest_sparsity_keeps_one_entry() -> None:
    harshest = settings(FORMS["sparsity"], MATRICES)[-1]
    assert ders.SparseDelta(1, 24, 10, sparsity=harshest).num_kept == 1


def test_the_exact_size_has_the_last_word() -> None:
    found = mildest(FORMS["bits"], MATRICES, size, lambda delta: 2 * size(delta), 1900)
    assert found.keywords["bits"] == 2
    assert 2 * size(functools.partial(ders.QuantizedDelta, bits=2)) <= 1900 < 2 * size(FORMS["bits"])


def test_no_dial() -> None:
    with pytest.raises(ValueError, match="one of the dials sparsity, bits, rank"):
        dial_of(ders.ZeroDelta)
