"""ders models in lmms-eval: `lmms-eval --model ders --model_args pretrained=DIR …`.

The harness finds them by the entry point `lmms_eval.models` of this package. Greedy answers, one process.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from torch import Tensor

from ders.data.conversation import IGNORED, Encoder
from ders.data.loading import collate_conversations, collate_questions
from ders.data.rows import IMAGE_TAG
from ders.harness.prompts import prompt_for
from ders.models.bundle import load_bundle
from ders.models.generation import generate_answers


def manifest() -> ModelManifest:
    """What the harness' registry asks an entry point for."""
    return ModelManifest(model_id="ders", simple_class_path=f"{__name__}.DersLMM")


class DersLMM(lmms):
    """A ders model folder, dense or upcycled, with or without a vision tower.

    A question is put into the prompt piece by piece, to the token what training saw, after the tag of its image; images
    are read by the folder's own processor.

    Args:
        pretrained: the folder.
        prompt: a name in `ders.data.conversation.PROMPTS`; "auto" is the one that the model was trained in.
        dtype: auto (the type the weights are stored in), float32, bfloat16 or float16.
        batch_size: questions at once.

    Raises:
        ModelFolderError: the folder is missing, incomplete or corrupt.
        ValueError: there is no such prompt.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, prompt: str = "auto", dtype: str = "auto", device: str = "cpu", batch_size: int | str = 1
    ) -> None:
        super().__init__()
        self.bundle = load_bundle(Path(pretrained), dtype=dtype if dtype == "auto" else getattr(torch, dtype))
        self.bundle.model.to(device).eval()
        self.batch_size = int(batch_size)
        self.encoder = Encoder(self.bundle.tokenizer, self.bundle.image_tokens, prompt_for(self.bundle.model, prompt))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, in the order of the requests.

        Raises:
            ValueError: a task asks for samples or beams, or for several images in one question.
        """
        answers = []
        for options, alike in itertools.groupby((request.args for request in requests), key=lambda args: args[1]):
            longest, until = _greedy(options)
            for batch in self._batches(list(alike)):
                items = [self._question(context, *where) for context, _, *where in batch]
                inputs = collate_questions(items, self.bundle.tokenizer.pad_token_id)["inputs"]
                told = generate_answers(self.bundle.model, self.bundle.tokenizer, self._placed(inputs), longest)
                answers += [_before(until, answer) for answer in told]
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(mean negative log-likelihood of the continuation's tokens, whether they are the greedy ones).

        Despite the name a loss, as in the harness' own models: its multiple-choice tasks take the least.
        """
        results = []
        for batch in self._batches([request.args for request in requests]):
            items = [self._answered(context, target, *where) for context, target, *where in batch]
            inputs = self._placed(collate_conversations(items, self.bundle.tokenizer.pad_token_id))
            labels_BS = inputs.pop("labels")[:, 1:]
            logp_BSV = self.bundle.model(**inputs).logits[:, :-1].float().log_softmax(-1)
            for logp_SV, labels_S in zip(logp_BSV, labels_BS, strict=True):
                told = labels_S != IGNORED
                logp_TV, labels_T = logp_SV[told], labels_S[told]
                loss = -logp_TV.gather(1, labels_T[:, None]).mean()
                results.append((float(loss), bool((logp_TV.argmax(-1) == labels_T).all())))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("each question is asked alone: tasks of several rounds are not supported")

    def _batches(self, arguments: list[tuple[Any, ...]]) -> Iterator[Sequence[tuple[Any, ...]]]:
        for start in range(0, len(arguments), self.batch_size):
            yield arguments[start : start + self.batch_size]

    def _placed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype, device = self.bundle.model.dtype, self.bundle.model.device
        return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}

    def _question(self, context: str, doc_to_visual: Any, doc_id: int, task: str, split: str) -> dict[str, Any]:
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        tags = context.count(IMAGE_TAG)
        if len(images) > 1 or tags not in (0, len(images)):
            raise ValueError(
                f"{task}, question {doc_id}: {len(images)} images and {tags} tags {IMAGE_TAG}. A question may have one "
                "image, and one tag for it"
            )
        if images and self.bundle.pixel_reader is None:
            raise ValueError(f"{task} has images, and this model reads only text")
        asked = f"{IMAGE_TAG}\n{context}" if len(images) > tags else context
        pixels = self.bundle.pixel_reader(images[0].convert("RGB")) if images else None
        return {"ids": self.encoder.prompt(asked), "pixels": pixels}

    def _answered(self, context: str, target: Any, *where: Any) -> dict[str, Any]:
        item = self._question(context, *where)
        if callable(target):
            _, doc_id, task, split = where
            target = target(self.task_dict[task][split][doc_id])
        # The blank that the harness puts before a target is the prompt's last character already.
        answer = self.bundle.tokenizer(str(target).removeprefix(" "), add_special_tokens=False)["input_ids"]
        labels = [IGNORED] * len(item["ids"]) + answer
        return {"ids": item["ids"] + answer, "labels": labels, "pixels": item["pixels"]}


def _greedy(options: dict[str, Any]) -> tuple[int, list[str]]:
    """(most tokens of an answer, what ends it)."""
    # Some tasks name a temperature and switch sampling off, MM-Vet for one.
    sampled = options.get("do_sample", bool(options.get("temperature")))
    if sampled or options.get("num_beams", 1) > 1:
        raise ValueError(f"answers are greedy here, and the task asks for {options}: --gen_kwargs do_sample=False")
    until = options.get("until", [])
    # Where a task sets no limit, the harness' own LLaVA takes this one.
    return int(options.get("max_new_tokens", 1024)), [until] if isinstance(until, str) else until


def _before(until: list[str], answer: str) -> str:
    for end in until:
        answer = answer.split(end)[0] if end else answer
    return answer
