"""Scores of a model on a split, beside what is reached without looking."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

from ders.data import DataSource, PreparedData
from ders.data.loading import PixelReader, Questions, collate_questions
from ders.data.metrics import MajorityPrior, summarize
from ders.evaluation.likelihood import likelihood
from ders.kernels import stable_hash
from ders.models.bundle import ModelBundle
from ders.models.generation import generate_answers
from ders.moe import take_routings

_KEPT = ("id", "image", "kind", "question", "answer", "annotations")


@dataclass(frozen=True)
class Score:
    """Scores by name, each with its sample count, and every single answer behind them."""

    metrics: dict[str, dict[str, float | int]]
    predictions: list[dict[str, Any]]


def score(bundle: ModelBundle, source: DataSource, prepared: PreparedData, split: str, prefix: str) -> Score:
    """Greedy answers to every question of a split: exact match, the question-only prior and the data's own scorers, by
    kind. Where the data is scored by likelihood, `likelihood` instead."""
    if source.scored_by == "likelihood":
        return Score(*likelihood(bundle, source, prepared, split, prefix))
    questions = Questions(
        prepared.split(split),
        source.encoder(bundle.tokenizer, bundle.image_tokens, split),
        PixelReader(prepared.image_root, bundle.pixel_reader),
    )
    collate = functools.partial(collate_questions, pad_id=bundle.tokenizer.pad_token_id)
    prior = MajorityPrior(prepared.readable("train"), (item["question"] for item in questions.items))
    device = next(bundle.model.parameters()).device
    items: list[dict[str, Any]] = []
    batches = DataLoader(questions, batch_size=source.eval_batch_size, collate_fn=collate)
    terminal = Console(stderr=True)
    for batch in track(batches, f"scoring {split}", console=terminal, disable=not terminal.is_terminal, transient=True):
        inputs = {
            key: value.to(device, bundle.model.dtype if value.is_floating_point() else None)
            for key, value in batch["inputs"].items()
        }
        # A router that draws its second choice with noise does so here too. The draw is the same each time for one
        # eval_batch_size on one kind of device, and another for others.
        torch.manual_seed(stable_hash("scoring", len(items)))
        images = [item["image"] for item in batch["items"]]
        answers = generate_answers(bundle.model, bundle.tokenizer, inputs, source.max_answer_tokens, images)
        take_routings(bundle.model)
        for item, answer in zip(batch["items"], answers, strict=True):
            kept = {key: item[key] for key in _KEPT if key in item}
            items.append({**kept, "prediction": answer, "prior": prior(item)})
    return Score(summarize(items, prefix, source.scorers), items)
