"""From question–answer turns to token ids and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ders.data.rows import IMAGE_TAG

IGNORED = -100  # labels that carry no loss


@dataclass(frozen=True)
class Template:
    """How turns become text (LLaVA's v1 form without a system sentence).

    Attributes:
        question, answer: patterns with `{}`; an end-of-sequence token follows each answer.
    """

    question: str = "USER: {} "
    answer: str = "ASSISTANT: {}"


@dataclass(frozen=True)
class Encoder:
    """Token ids of conversations.

    Every piece is tokenized on its own, so the labels cannot slip against the ids, and the prompt that evaluation
    gives is to the token the prefix that training saw.

    Attributes:
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token and, for images, the token `<image>`.
        image_tokens: visual tokens of one image; the image tag becomes this many image tokens.
    """

    tokenizer: Any
    image_tokens: int = 0
    template: Template = Template()

    def conversation(self, questions: Sequence[str], answers: Sequence[str]) -> tuple[list[int], list[int]]:
        """(ids, labels) of a whole conversation; only answers and the token that ends them carry a loss."""
        ids, labels = self._start(), [IGNORED] * len(self._start())
        before, after = self.template.answer.split("{}")
        for question, answer in zip(questions, answers, strict=True):
            asked = self._text(self.template.question.format(question)) + self._text(before)
            told = [*self._text(f"{answer}{after}"), self.tokenizer.eos_token_id]
            ids += asked + told
            labels += [IGNORED] * len(asked) + told
        return ids, labels

    def prompt(self, question: str) -> list[int]:
        """Ids after which the model should answer."""
        before = self.template.answer.split("{}")[0]
        return self._start() + self._text(self.template.question.format(question)) + self._text(before)

    def _start(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    def _text(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(text.split(IMAGE_TAG)):
            if number:
                ids += [self.tokenizer.convert_tokens_to_ids(IMAGE_TAG)] * self.image_tokens
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids
