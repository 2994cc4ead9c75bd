"""Prompts to the token, and what max_length cuts."""

import pytest

from ders.data import DigitsVQA
from ders.data.conversation import IGNORED, PROMPTS, Encoder
from ders.data.faults import DataError
from ders.models.bundle import ModelBundle
from ders.models.tiny import word_tokenizer

MAGICODER = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable responses "
    "to user instructions.\n\n@@ Instruction\nAdd two numbers.\n\n@@ Response\n"
)


class Pieces:
    """A tokenizer whose tokens are the pieces of text it was given."""

    bos_token_id, eos_token_id = "<s>", "</s>"

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[str]]:
        assert not add_special_tokens
        return {"input_ids": [text] if text else []}

    def convert_tokens_to_ids(self, token: str) -> str:
        return token


def encoder(prompt: str, image_tokens: int = 0, max_length: int | None = None) -> Encoder:
    return Encoder(Pieces(), image_tokens, PROMPTS[prompt], max_length)


def test_vicuna_is_the_default() -> None:
    assert Encoder(Pieces()).template == PROMPTS["vicuna"] == PROMPTS[DigitsVQA().prompt]
    ids, _ = encoder("vicuna", image_tokens=2).conversation(["<image>\nWhat?", "And?"], ["A", "B"])
    first = ["<s>", "USER: ", "<image>", "<image>", "\nWhat? ", "ASSISTANT: ", "A", "</s>"]
    assert ids == [*first, "USER: And? ", "ASSISTANT: ", "B", "</s>"]


def test_plain_is_an_image_and_its_caption() -> None:
    ids, labels = encoder("plain", image_tokens=2).conversation(["Write a caption.\n<image>"], ["two dogs"])
    assert ids == ["<s>", "<image>", "<image>", "two dogs\n", "</s>"]
    assert labels == [IGNORED] * 3 + ["two dogs\n", "</s>"]
    assert encoder("plain").conversation(["Say something."], ["text alone"])[0] == ["<s>", "text alone\n", "</s>"]


def test_magicoder_is_one_piece_of_text_before_the_response() -> None:
    ids, labels = encoder("magicoder").conversation(["Add two numbers."], ["a + b"])
    assert ids == ["<s>", MAGICODER, "a + b", "</s>"]
    assert labels == [IGNORED, IGNORED, "a + b", "</s>"]
    assert encoder("magicoder").prompt("Add two numbers.") == ids[:2]


def test_the_start_stands_once() -> None:
    ids, _ = encoder("magicoder").conversation(["One.", "Two."], ["1", "2"])
    assert "".join(ids).count("You are an exceptionally") == 1
    assert "".join(ids).count("@@ Instruction\n") == 2


def test_max_length_cuts_ids_and_labels_alike() -> None:
    whole = encoder("vicuna").conversation(["A?", "B?"], ["yes", "no"])
    ids, labels = encoder("vicuna", max_length=5).conversation(["A?", "B?"], ["yes", "no"])
    assert (ids, labels) == (whole[0][:5], whole[1][:5])
    assert encoder("vicuna", max_length=len(whole[0])).conversation(["A?", "B?"], ["yes", "no"]) == whole
    assert encoder("vicuna", max_length=2).prompt("A?") == encoder("vicuna").prompt("A?")


def test_max_length_never_ends_within_an_image() -> None:
    with pytest.raises(DataError, match="max_length=4 ends within the 8 tokens of an image"):
        encoder("plain", image_tokens=8, max_length=4).conversation(["<image>"], ["a dog"])


def test_a_word_tokenizer_knows_every_prompt(llava_model: ModelBundle, tmp_path: object) -> None:
    source = DigitsVQA(num_train=4, num_val=1, num_test=1, images=False, prompt="magicoder")
    tokenizer = word_tokenizer(source.prepare(tmp_path).texts())
    prompt = source.encoder(tokenizer, 0).prompt("What is the largest digit?")
    assert tokenizer.unk_token_id not in prompt
    assert tokenizer.decode(prompt).endswith("@ @ Response")


def test_the_vicuna_prompt_adds_no_word(tmp_path: object) -> None:
    prepared = DigitsVQA(num_train=4, num_val=1, num_test=1).prepare(tmp_path)
    turns = [text for row in prepared.split("train") for text in (*row["questions"], *row["answers"])]
    assert word_tokenizer(prepared.texts()).get_vocab() == word_tokenizer(turns).get_vocab()


def test_unknown_prompts_and_lengths_are_refused() -> None:
    with pytest.raises(
        ValueError, match="prompt must be one of vicuna, llava_v1, plain, completion, magicoder: got 'alpaca'"
    ):
        DigitsVQA(prompt="alpaca")
    with pytest.raises(
        ValueError, match="prompt must be one of vicuna, llava_v1, plain, completion, magicoder: got 'alpaca'"
    ):
        DigitsVQA(split_prompts={"train": "alpaca"})
    with pytest.raises(ValueError, match=r"data\.max_length must be a whole number from 1 on: got 0"):
        DigitsVQA(max_length=0)
    with pytest.raises(ValueError, match=r"data\.scorers must name exact, .*: got 'bleu'"):
        DigitsVQA(scorers={"open": "bleu"})
