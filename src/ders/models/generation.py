"""Greedy answers."""

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate_answers(model: nn.Module, tokenizer: Any, inputs: dict[str, Tensor], max_new_tokens: int) -> list[str]:
    """One greedy answer per row of left-padded inputs, special tokens removed. The training mode is left as it was."""
    training = model.training
    model.eval()
    try:
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    finally:
        model.train(training)
    answers: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
