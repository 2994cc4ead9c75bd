"""Greedy answers, and greedy texts that end where a rule says."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from ders.moe import moe_layers

# Texts that ended leave the batch after so many tokens: a lone long one then costs its own time, not the whole batch's.
_ROUND = 32


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    images: Sequence[Hashable | None] | None = None,
) -> list[str]:
    """One greedy answer per row of left-padded inputs, special tokens removed. The training mode is left as it was.

    Args:
        images: which picture each row shows. What prompts have in common up to the picture, most of a short question's
            tokens, is then computed once per picture, as far as no router looks at a token's whole batch.
    """
    training = model.training
    model.eval()
    try:
        given: dict[str, Any] = inputs if images is None else _sharing(model, tokenizer, inputs, images)
        output = model.generate(
            **given,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    finally:
        model.train(training)
    answers: list[str] = tokenizer.batch_decode(output[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _sharing(
    model: nn.Module, tokenizer: Any, inputs: dict[str, Tensor], images: Sequence[Hashable | None]
) -> dict[str, Any]:
    """The same inputs, their common beginning in a cache; as they are where that is no gain, or not the same."""
    pictures = {image: number for number, image in enumerate(dict.fromkeys(images))}
    pixels = inputs.get("pixel_values")
    if pixels is None or None in pictures or not len(pictures) < len(images) == len(pixels):
        return inputs
    if any(layer.router.depends_on_batch for layer in moe_layers(model).values()):
        return inputs
    rows = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    # One token at least must be left to go on from.
    beginnings = torch.stack([row[: min(map(len, rows)) - 1] for row in rows])
    width = int((beginnings == beginnings[0]).all(0).long().cumprod(0).sum())
    ends = [row[width:] for row in rows]
    if any((end == model.config.image_token_id).any() for end in ends):  # type: ignore[union-attr]
        return inputs
    device = pixels.device
    first = torch.tensor([images.index(image) for image in pictures], device=device)
    beginning = rows[0][:width].expand(len(pictures), -1)
    cache = model(input_ids=beginning, pixel_values=pixels[first], use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_select_indices(torch.tensor([pictures[image] for image in images], device=device))
    longest = max(map(len, ends))
    ids_BL = inputs["input_ids"].new_full((len(rows), width + longest), tokenizer.pad_token_id)
    mask_BL = torch.zeros_like(ids_BL)
    ids_BL[:, :width], mask_BL[:, :width] = rows[0][:width], 1
    for row, end in enumerate(ends):
        ids_BL[row, -len(end) :], mask_BL[row, -len(end) :] = end, 1
    return {"input_ids": ids_BL, "attention_mask": mask_BL, "past_key_values": cache}


@torch.no_grad()
def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    is_settled: Callable[[int, str], bool],
) -> list[str]:
    """The greedy continuation of each prompt, with a key-value cache, spaces and all as the model wrote them.

    Args:
        prompts: token ids; padded on the left.
        is_settled: whether the text so far of the prompt of that number needs no more; asked after each line break and
            each backtick.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    ends = _end_ids(model, tokenizer)
    rule = _Settled(tokenizer, prompts, width, is_settled)
    texts = [""] * len(prompts)
    cache = None
    training = model.training
    model.eval()
    try:
        while rule.rows:
            left = width + max_new_tokens - ids.shape[1]
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=min(left, _ROUND),
                do_sample=False,
                num_beams=1,
                # Some chat models' folders set one, and greedy is then no longer the most likely token.
                repetition_penalty=1.0,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                stopping_criteria=StoppingCriteriaList([rule]),
                return_dict_in_generate=True,
            )
            ids, cache = output.sequences, output.past_key_values
            unfinished = []
            for place, (row, new) in enumerate(zip(rule.rows, ids[:, width:].tolist(), strict=True)):
                texts[row] = _continuation(tokenizer, prompts[row], _until(new, ends))
                if not rule.done[row] and not set(new).intersection(ends) and left > _ROUND:
                    unfinished.append(place)
            rule.rows = [rule.rows[place] for place in unfinished]
            kept = torch.tensor(unfinished, dtype=torch.long, device=device)
            cache.batch_select_indices(kept)
            ids = ids[kept]
            mask = nn.functional.pad(mask[kept], (0, ids.shape[1] - mask.shape[1]), value=1)
    finally:
        model.train(training)
    return texts


class _Settled(StoppingCriteria):
    """Ends each row by itself, as its text is settled.

    Attributes:
        rows: which prompt each row of the batch is of.
        done: of each prompt, whether its text is settled.
    """

    def __init__(
        self, tokenizer: Any, prompts: Sequence[Sequence[int]], width: int, is_settled: Callable[[int, str], bool]
    ) -> None:
        self._tokenizer, self._prompts, self._width, self._is_settled = tokenizer, prompts, width, is_settled
        self.rows = list(range(len(prompts)))
        self.done = [False] * len(prompts)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        last = self._tokenizer.batch_decode(input_ids[:, -1:])
        for row, ids, text in zip(self.rows, input_ids, last, strict=True):
            if not self.done[row] and ("\n" in text or "`" in text):
                new = ids[self._width :].tolist()
                self.done[row] = self._is_settled(row, _continuation(self._tokenizer, self._prompts[row], new))
        return torch.tensor([self.done[row] for row in self.rows], device=input_ids.device)


def _continuation(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens after a prompt. By themselves they would lose a leading space in some vocabularies, and
    with it Python's indentation."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text: str = tokenizer.decode([*prompt, *new], **options)
    return text[len(tokenizer.decode(prompt, **options)) :]


def _until(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokenizer's end-of-sequence token and those of the model's folder: a chat model's turns end with another."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})
