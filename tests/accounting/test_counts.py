"""Counts of models at the paper's real shapes, built on the meta device, against the numbers the paper prints."""

import functools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ders

STABLELM = {"model_type": "stablelm", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24}
QWEN = {"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24}
PHI = {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}
SM = functools.partial(ders.SparseDelta, sparsity=0.9999)
LM = functools.partial(ders.LowRankDelta, rank=1)


def on_meta(shapes: dict[str, Any], delta: Any, **options: Any) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes, num_attention_heads=32, vocab_size=100))
    before = sum(p.numel() for p in model.parameters())
    summary = ders.upcycle(model, delta=delta, **options)
    counts = ders.count_parameters(model)
    assert counts.total_params - before == counts.added_params == summary.added_params
    return counts


@pytest.mark.parametrize(
    ("shapes", "delta", "printed"),
    [
        (STABLELM, None, "1.25B"),  # the paper truncates to 1.24B
        (STABLELM, SM, "0.26M"),
        (STABLELM, LM, "1.20M"),
        (QWEN, None, "1.22B"),
        (QWEN, SM, "0.26M"),
        (QWEN, LM, "1.19M"),
        (PHI, None, "2.52B"),
        (PHI, SM, "1.11M"),
        (PHI, LM, "2.42M"),
    ],
)
def test_table_1(shapes: dict[str, Any], delta: Any, printed: str) -> None:
    added = on_meta(shapes, delta).added_params_paper
    unit = {"B": 1e9, "M": 1e6}[printed[-1]]
    assert f"{added / unit:.2f}{printed[-1]}" == printed


def test_universal_ffns_are_told_apart() -> None:
    counts = on_meta(STABLELM, SM, top_k=1, universal=True)
    assert f"{counts.added_params_universal / 1e9:.2f}" == "0.42"
    assert counts.added_params_paper == counts.added_params - counts.added_params_universal


@pytest.mark.parametrize("delta", [None, SM])
def test_active_parameters_hold_top_k_of_the_experts(delta: Any) -> None:
    counts = on_meta(STABLELM, delta)
    experts = 4 * 12 * (3 * 2048 * 5632 if delta is None else 3 * round(1e-4 * 2048 * 5632))
    assert counts.total_params - counts.active_params == experts // 2


def test_dense_models_add_nothing(dense_model: Any) -> None:
    counts = ders.count_parameters(dense_model())
    assert counts.added_params == counts.added_params_paper == 0
    assert counts.active_params == counts.total_params == counts.trainable_params
