"""ders models in EleutherAI's lm-evaluation-harness: `python -m ders.harness.lm_eval run --model ders …`.

The harness finds the models of other packages by no entry point: this registers ours and hands over to its own command
line. Text only; folders with a vision tower answer text benchmarks, and `ders.harness.lmms_eval` shows them images.
"""

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoModelForImageTextToText

from ders.data.conversation import Encoder
from ders.data.loading import pad
from ders.harness.prompts import prompt_for


@register_model("ders")
class DersLM(HFLM):
    """The harness' own Hugging Face model, on a folder that only `import ders` makes readable.

    Args:
        pretrained: a ders model folder, dense or upcycled; safetensors only, and no code from it.
        prompt: None gives the model what a task writes, as the harness does for any model. A name in
            `ders.data.conversation.PROMPTS`, or "auto" for the one that the model was trained in, takes what a task
            writes (its few-shot examples too) for the question, and tokenizes piece by piece, to the token what
            training saw.
        options: those of the harness' `hf` model.

    Raises:
        ValueError: there is no such prompt, or remote code is asked for.
    """

    def __init__(self, pretrained: str, prompt: str | None = None, **options: Any) -> None:
        if options.pop("trust_remote_code", False):
            raise ValueError("a ders folder holds no code: leave trust_remote_code out")
        super().__init__(pretrained, use_safetensors=True, **options)
        self.encoder = None if prompt is None else Encoder(self.tokenizer, template=prompt_for(self.model, prompt))

    def _get_backend(self, config: Any, **options: Any) -> None:
        if hasattr(config, "vision_config"):
            self.AUTO_MODEL_CLASS = AutoModelForImageTextToText
        super()._get_backend(config, **options)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, S) of contexts to answer.

        Raises:
            ValueError: a prompt leaves no room for its answer; cut, it would not be the prompt any more.
        """
        if self.encoder is None:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        prompts = [self.encoder.prompt(string) for string in strings]
        longest = max(map(len, prompts))
        if left_truncate_len is not None and longest > left_truncate_len:
            raise ValueError(
                f"a prompt has {longest} tokens, and {left_truncate_len} are left beside the answer: fewer examples, "
                "or max_length=… where the model reads more"
            )
        left = padding_side == "left"
        ids = pad(prompts, self.tokenizer.pad_token_id, left=left)
        return ids, pad([[1] * len(prompt) for prompt in prompts], 0, left=left)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.encoder is None:
            return super()._encode_pair(context, continuation)
        # The blank that the harness puts between the two is the prompt's last character already.
        answer = self.tokenizer(continuation.removeprefix(" "), add_special_tokens=False)["input_ids"]
        return self.encoder.prompt(context), answer


if __name__ == "__main__":
    cli_evaluate()
