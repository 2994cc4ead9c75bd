"""Model states against DeepSpeed's own estimators, and by hand where only a part trains."""

from collections.abc import Callable
from typing import Any

import pytest

import ders
from ders.accounting.memory import StateBytes, TrainedParams, activation_bytes, model_state_bytes

ALL = TrainedParams(trainable=1_000_003, frozen=0, largest=30_000)
# What its estimators leave out: a process' gradients in bf16 once more, while they are copied to fp32.
COPIED = 2
# DeepSpeed multiplies what the CPU holds by this, for pinned buffers.
BUFFER_FACTOR = 1.5


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("offload", [False, True])
def test_zero_2_is_deepspeeds_estimate(num_gpus: int, offload: bool) -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    cpu, gpu = zero.estimate_zero2_model_states_mem_needs(
        ALL.trainable, num_gpus_per_node=num_gpus, cpu_offload=offload, additional_buffer_factor=BUFFER_FACTOR
    )
    found = model_state_bytes(ALL, stage=2, num_gpus=num_gpus, offload=offload)
    assert found.gpu == pytest.approx(gpu + (0 if offload else COPIED * ALL.trainable / num_gpus), abs=2)
    if offload and num_gpus <= 4:  # from five processes on, the fp32 copies they load at first outweigh the states
        assert int(found.cpu * BUFFER_FACTOR) == cpu


@pytest.mark.parametrize("num_gpus", [1, 2, 8])
@pytest.mark.parametrize("offload", [False, True])
def test_zero_3_is_deepspeeds_estimate(num_gpus: int, offload: bool) -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.stage3")
    cpu, gpu, gathered = zero.estimate_zero3_model_states_mem_needs(
        ALL.trainable,
        ALL.largest,
        num_gpus_per_node=num_gpus,
        cpu_offload=offload,
        cpu_offload_params=offload,
        additional_buffer_factor=BUFFER_FACTOR,
    )
    found = model_state_bytes(ALL, stage=3, num_gpus=num_gpus, offload=offload)
    assert gathered == 4 * ALL.largest
    # The estimate adds what is gathered in the backward pass to the fp32 gradients of the step, where nothing is.
    share = ALL.trainable / num_gpus
    in_backward, at_the_step = gpu - (4 - 2) * share, gpu - gathered + 2 * COPIED * share
    assert found.gpu == (gpu if offload else pytest.approx(max(in_backward, at_the_step), abs=2))
    if offload:
        assert int(found.cpu * BUFFER_FACTOR) == cpu


@pytest.mark.parametrize(
    ("stage", "offload", "expected"),
    [
        (0, False, StateBytes(2 * 110 + 18 * 100)),
        (1, False, StateBytes(2 * 110 + max(2 * 100 + 12 * 25, 20 * 25))),
        (1, True, StateBytes(2 * 110 + 2 * 100, 16 * 100)),
        (2, False, StateBytes(2 * 110 + 20 * 25)),
        (2, True, StateBytes(2 * 110, 16 * 100)),
        (3, False, StateBytes(2 * 110 // 4 + 20 * 25)),
        (3, True, StateBytes(4 * 7, 18 * 100 + 2 * 10)),
    ],
)
def test_frozen_parameters_are_held_in_half_precision_only(stage: int, offload: bool, expected: StateBytes) -> None:
    params = TrainedParams(trainable=100, frozen=10, largest=7)
    assert model_state_bytes(params, stage=stage, num_gpus=4, offload=offload) == expected


def test_parameters_are_read_off_a_model(dense_model: Callable[..., Any]) -> None:
    model = dense_model()
    ders.upcycle(model)
    trainable = ders.set_trainable(model, "paper")
    params = TrainedParams.of(model)
    assert params.trainable == trainable
    assert params.trainable + params.frozen == sum(p.numel() for p in model.parameters())
    assert params.largest == 3 * 4 * 32 * 48  # the experts' three stacks are held by one module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": 4}, r"stage must be one of \(0, 1, 2, 3\): got 4"),
        ({"stage": 1, "num_gpus": 0}, "num_gpus must be at least 1: got 0"),
        ({"stage": 0, "offload": True}, "stage 0 .* divides nothing"),
    ],
)
def test_what_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_state_bytes(ALL, **arguments)


def test_activations_by_hand(dense_model: Callable[..., Any]) -> None:
    model = dense_model()
    dense = 4 * 2 * 32 + 2 * (8 * 32 + 3 * 48) + 10 * 61
    assert activation_bytes(model, 10) == 10 * dense
    ders.upcycle(model, top_k=2, universal=True)
    assert activation_bytes(model, 10) == 10 * (dense + 2 * 2 * 3 * 48)
