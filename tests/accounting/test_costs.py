"""FLOPs against torch's own counter, bytes of a decoded token by hand."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ders
from ders.accounting.costs import decode_bytes, flops_per_token
from ders.moe import moe_layers

SM = functools.partial(ders.SparseDelta, sparsity=0.75)
LM = functools.partial(ders.LowRankDelta, rank=2)
TOKENS = 3
FFN, ROUTER = 3 * 32 * 48, 4 * 32


def counted(model: Any) -> int:
    """What torch counts per token, without the products of attention scores and of rotary positions."""
    ids = torch.tensor([[5, 9, 12]])
    # Grouped products are not in torch's table of formulas.
    grouped = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter, torch.no_grad():
        model(ids)
    by_operation = counter.get_flop_counts()["Global"]
    weights = [
        flops
        for operation, flops in by_operation.items()
        if not any(word in str(operation) for word in ("bmm", "attention"))
    ]
    return sum(weights) // TOKENS


@pytest.mark.parametrize("model_type", ["llama", "phi", "gpt_neox"])
def test_a_dense_model(dense_model: Callable[..., Any], model_type: str) -> None:
    model = dense_model(model_type)
    assert flops_per_token(model) == counted(model)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("universal", [False, True])
def test_full_experts(dense_model: Callable[..., Any], top_k: int, universal: bool) -> None:
    model = dense_model("phi")
    ders.upcycle(model, top_k=top_k, universal=universal)
    assert flops_per_token(model) == counted(model)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("extended", [False, True])
def test_low_rank_deltas(
    dense_model: Callable[..., Any], top_k: int, extended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch operations, which torch can count, the layer multiplies the thin factors of all experts and masks: what
    it does beyond K is taken out here."""
    monkeypatch.setattr("ders.moe.experts.can_mix", lambda *_: False)
    model = dense_model()
    ders.upcycle(model, delta=LM, top_k=top_k, universal=extended, extended=extended)
    slots, experts = top_k + extended, 4 + extended
    one = 2 * 3 * 2 * (32 + 48)
    assert flops_per_token(model) == counted(model) - 2 * slots * (experts - 1) * one


def test_other_deltas_by_hand(dense_model: Callable[..., Any]) -> None:
    dense = flops_per_token(dense_model())
    per_layer = {
        SM: 2 * 3 * 32 * 48 // 4,
        functools.partial(SM, values_bits=4): 2 * 3 * 32 * 48 // 4,
        functools.partial(ders.QuantizedDelta, bits=2): 2 * FFN,
        ders.ZeroDelta: 0,
    }
    for delta, multiply_adds in per_layer.items():
        model = dense_model()
        ders.upcycle(model, delta=delta)
        assert flops_per_token(model) - dense == 2 * 2 * (multiply_adds + ROUTER)


def test_a_vision_tower_is_not_met(llava_model: Any) -> None:
    model = llava_model.model
    text = model.model.language_model
    met = sum(p.numel() for name, p in text.named_parameters() if p.dim() > 1 and "embed" not in name)
    assert flops_per_token(model) == 2 * (met + model.lm_head.weight.numel())


def test_bytes_of_a_dense_model(dense_model: Callable[..., Any]) -> None:
    model = dense_model()
    whole = sum(p.numel() for p in model.parameters()) - 61 * 32
    assert decode_bytes(model) == 4 * (whole + 32)
    assert decode_bytes(model, 8) == 4 * (whole / 8 + 32)
    assert decode_bytes(model.to(torch.bfloat16)) == 2 * (whole + 32)


def test_a_batch_meets_more_of_the_full_experts(dense_model: Callable[..., Any]) -> None:
    dense = decode_bytes(dense_model(), 3) * 3
    model = dense_model()
    ders.upcycle(model, top_k=1)
    distinct = 4 * (1 - 0.75**3)
    assert decode_bytes(model, 3) * 3 == pytest.approx(dense + 2 * 4 * ((distinct - 1) * FFN + ROUTER))


def test_a_shared_base_is_read_once(dense_model: Callable[..., Any]) -> None:
    dense = decode_bytes(dense_model())
    model = dense_model("llama")
    ders.upcycle(model, delta=functools.partial(ders.QuantizedDelta, bits=2), top_k=2)
    per_expert = sum(
        delta.storage_bits() // 8 // 4
        for layer in moe_layers(model).values()
        for delta in layer.experts.deltas.values()  # type: ignore[union-attr]
    )
    assert per_expert == 2 * (FFN // 4 + (48 + 48 + 32) * 2 * 2)
    assert decode_bytes(model) == dense + 2 * per_expert + 2 * 4 * ROUTER


def test_an_extended_delta_is_met_by_every_token(dense_model: Callable[..., Any]) -> None:
    plain, extended = dense_model(), dense_model()
    ders.upcycle(plain, delta=LM, top_k=1)
    ders.upcycle(extended, delta=LM, top_k=1, universal=True, extended=True)
    one = 2 * 4 * 3 * 2 * (32 + 48)
    assert decode_bytes(extended) - decode_bytes(plain) == one


def test_an_empty_batch(dense_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="batch must be at least 1: got 0"):
        decode_bytes(dense_model(), 0)
