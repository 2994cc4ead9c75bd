import functools
from typing import Any

import pytest
import torch

import ders
from ders.data.loading import collate_questions
from ders.models.bundle import ModelBundle
from ders.models.generation import _sharing, generate_answers
from ders.moe import moe_layers


def test_left_padding_changes_no_answer(llava_model: ModelBundle) -> None:
    items = [
        {"ids": [1, 5, 6, 7], "pixels": None},
        {"ids": [1, *[4] * 4, 8, 9, 6, 5, 7], "pixels": torch.randn(3, 16, 16)},
    ]
    pad = llava_model.tokenizer.pad_token_id
    together = generate_answers(llava_model.model, llava_model.tokenizer, collate_questions(items, pad)["inputs"], 5)
    alone = [
        generate_answers(llava_model.model, llava_model.tokenizer, collate_questions([item], pad)["inputs"], 5)[0]
        for item in items
    ]
    assert together == alone


def test_the_training_mode_is_left_as_it_was(llava_model: ModelBundle) -> None:
    llava_model.model.train()
    generate_answers(llava_model.model, llava_model.tokenizer, {"input_ids": torch.tensor([[1, 5]])}, 2)
    assert llava_model.model.training


METHODS: dict[str, Any] = {
    "vanilla": None,
    "ders_sm": functools.partial(ders.SparseDelta, sparsity=0.9),
    "ders_lm": functools.partial(ders.LowRankDelta, rank=2),
}
PICTURES = {name: torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
# Prompts begin alike, up to the picture and two tokens more; one ends there but for its last token.
ASKED = [("a", [8, 9, 6]), ("b", [8, 9, 5, 7, 10]), ("a", [8, 9, 5]), ("a", [8, 9, 6, 6, 5, 7, 11, 12])]


def questions(asked: list[tuple[str | None, list[int]]] = ASKED) -> tuple[dict[str, torch.Tensor], list[str | None]]:
    items = [
        {"ids": [1, *([4] * 4 if name else []), *end], "pixels": PICTURES[name] if name else None}
        for name, end in asked
    ]
    return collate_questions(items, 0)["inputs"], [name for name, _ in asked]


@pytest.mark.parametrize("method", [None, *METHODS])
def test_a_shared_beginning_changes_nothing(method: str | None, llava_model: ModelBundle) -> None:
    model, tokenizer = llava_model.model, llava_model.tokenizer
    assert (model.config.image_token_id, tokenizer.pad_token_id) == (4, 0)
    if method:
        ders.upcycle(model, delta=METHODS[method], top_k=1)
        for layer in moe_layers(model).values():
            for parameter in layer.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.double().eval()
    inputs, images = questions()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    told = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    shared = _sharing(model, tokenizer, inputs, images)
    assert "pixel_values" not in shared
    assert shared["past_key_values"].get_seq_length() == 7
    plain, fast = (model.generate(**given, **told, pad_token_id=0, eos_token_id=99) for given in (inputs, shared))
    assert torch.equal(plain.sequences[:, -5:], fast.sequences[:, -5:])
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(fast.logits), rtol=1e-9, atol=1e-9)
    answers = [generate_answers(model, tokenizer, inputs, 5, names) for names in (None, images)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "asked",
    [
        [("a", [8, 9]), ("b", [8, 7])],  # a picture each
        [("a", [8, 9]), ("a", [8, 7]), (None, [8, 9])],
        [(None, [8, 9]), (None, [8, 7])],
    ],
)
def test_nothing_is_shared_where_it_is_no_gain(asked: Any, llava_model: ModelBundle) -> None:
    inputs, images = questions(asked)
    assert _sharing(llava_model.model, llava_model.tokenizer, inputs, images) is inputs


@pytest.mark.parametrize("router", [{"second_choice_noise": True}, {"eval_capacity_factor": 1.5}])
def test_nothing_is_shared_where_routers_look_at_the_batch(router: Any, llava_model: ModelBundle) -> None:
    ders.upcycle(llava_model.model, router=functools.partial(ders.TopKRouter, **router))
    inputs, images = questions()
    assert _sharing(llava_model.model, llava_model.tokenizer, inputs, images) is inputs


def test_a_picture_behind_the_question_is_not_shared(llava_model: ModelBundle) -> None:
    inputs, images = questions([("a", [8, 9]), ("a", [7, 9])])
    rows = [[1, 8, *[4] * 4, 9], [1, 7, *[4] * 4, 9]]
    inputs["input_ids"] = torch.tensor(rows)
    assert _sharing(llava_model.model, llava_model.tokenizer, inputs, images) is inputs
