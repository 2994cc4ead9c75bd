import torch

from ders.data.loading import collate_questions
from ders.models.bundle import ModelBundle
from ders.models.generation import generate_answers


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
