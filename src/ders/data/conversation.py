"""From question–answer turns to token ids and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ders.data.faults import DataError
from ders.data.rows import IMAGE_TAG

IGNORED = -100  # labels that carry no loss


@dataclass(frozen=True)
class Template:
    """How turns become text (LLaVA's v1 form without a system sentence).

    Attributes:
        question, answer: patterns with `{}`; an end-of-sequence token follows each answer.
        start: what stands once before the first question.
        keep_question: False leaves only the image tag of a question.
    """

    question: str = "USER: {} "
    answer: str = "ASSISTANT: {}"
    start: str = ""
    keep_question: bool = True

    def asked(self, question: str) -> str:
        """A question as text, without what `start` adds."""
        return self.question.format(question if self.keep_question else IMAGE_TAG * question.count(IMAGE_TAG))

    def words(self) -> str:
        """The words that the prompt itself brings."""
        return " ".join((self.start, self.question.format(""), self.answer.format("")))


PROMPTS = {
    "vicuna": Template(),
    # The same with the sentence that MoE-LLaVA's and Med-MoE's conversations begin with.
    "llava_v1": Template(
        start="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
    ),
    # LLaVA's first stage, "plain": an image, then its caption. LLaVA ends it by the line break alone.
    "plain": Template(question="{}", answer="{}\n", keep_question=False),
    # A text to be continued: the question is its beginning.
    "completion": Template(question="{}", answer="{}"),
    # Magicoder's prompt (arXiv 2312.02120); all before the response is one piece of text, as it is tokenized there.
    "magicoder": Template(
        question="@@ Instruction\n{}\n\n@@ Response\n",
        answer="{}",
        start="You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
        "responses to user instructions.\n\n",
    ),
}


def named_prompt(name: str) -> Template:
    """The prompt of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROMPTS:
        raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}: got {name!r}")
    return PROMPTS[name]


@dataclass(frozen=True)
class Encoder:
    """Token ids of conversations.

    Every piece is tokenized on its own, so the labels cannot slip against the ids, and the prompt that evaluation
    gives is to the token the prefix that training saw.

    Attributes:
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token and, for images, the token `<image>`.
        image_tokens: visual tokens of one image; the image tag becomes this many image tokens.
        max_length: longest conversation in tokens, visual ones included; what is longer loses its end. Prompts are
            never cut: they end where the answer begins.
    """

    tokenizer: Any
    image_tokens: int = 0
    template: Template = Template()
    max_length: int | None = None

    def conversation(self, questions: Sequence[str], answers: Sequence[str]) -> tuple[list[int], list[int]]:
        """(ids, labels) of a whole conversation; only answers and the token that ends them carry a loss.

        Raises:
            DataError: `max_length` ends within an image.
        """
        ids, labels = self._start(), [IGNORED] * len(self._start())
        before, after = self.template.answer.split("{}")
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            asked = self._question(question, first=number == 0) + self._text(before)
            told = [*self._text(f"{answer}{after}"), self.tokenizer.eos_token_id]
            ids += asked + told
            labels += [IGNORED] * len(asked) + told
        if self.max_length is None or len(ids) <= self.max_length:
            return ids, labels
        if self._images(ids[: self.max_length]) != self._images(ids):
            raise DataError(
                f"max_length={self.max_length} ends within the {self.image_tokens} tokens of an image: set it higher"
            )
        return ids[: self.max_length], labels[: self.max_length]

    def prompt(self, question: str) -> list[int]:
        """Ids after which the model should answer."""
        before = self.template.answer.split("{}")[0]
        return self._start() + self._question(question, first=True) + self._text(before)

    def _start(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    def _question(self, question: str, *, first: bool) -> list[int]:
        return self._text((self.template.start if first else "") + self.template.asked(question))

    def _images(self, ids: list[int]) -> int:
        return ids.count(self.tokenizer.convert_tokens_to_ids(IMAGE_TAG)) if self.image_tokens else 0

    def _text(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(text.split(IMAGE_TAG)):
            if number:
                ids += [self.tokenizer.convert_tokens_to_ids(IMAGE_TAG)] * self.image_tokens
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids
