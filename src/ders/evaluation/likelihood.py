"""What a model thinks of the answers that stand there: for answers too long to be met word by word.

B batch, L tokens, V vocabulary.
"""

import math
from collections import Counter, defaultdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from ders.data import DataSource, PreparedData
from ders.data.conversation import IGNORED, Encoder
from ders.data.loading import collate_conversations
from ders.models.answers import answer_logits
from ders.models.bundle import ModelBundle
from ders.moe import take_routings

Row = dict[str, Any]


class BigramPrior:
    """The commonest token after the one before, in the training answers: the prompt unread.

    After a token never met there it is the commonest of all.
    """

    def __init__(self, rows: list[Row]) -> None:
        after: dict[int, Counter[int]] = defaultdict(Counter)
        overall: Counter[int] = Counter()
        for row in rows:
            for before, token in _answer_tokens(row):
                after[before][token] += 1
                overall[token] += 1
        self.after = {before: counts.most_common(1)[0][0] for before, counts in after.items()}
        self.overall = overall.most_common(1)[0][0] if overall else None

    def num_correct(self, row: Row) -> int:
        """How many of a row's answer tokens it gets."""
        return sum(self.after.get(before, self.overall) == token for before, token in _answer_tokens(row))


def likelihood(
    bundle: ModelBundle, source: DataSource, prepared: PreparedData, split: str, prefix: str
) -> tuple[dict[str, dict[str, float | int]], list[Row]]:
    """How well the tokens of a split's answers are foretold, each from all tokens before it.

    `prefix/loss` is the mean negative log-likelihood of an answer token in nats, `prefix/perplexity` its exponential,
    `prefix/accuracy` the fraction of tokens that the model thinks likeliest, `prefix/prior` the same of `BigramPrior`;
    overall and by kind, each with its count of tokens. The second result has the same of every answer.
    """
    encoder = source.encoder(bundle.tokenizer, bundle.image_tokens, split)
    rows = _encoded(prepared.split(split), encoder)
    prior = BigramPrior(_encoded(prepared.readable("train"), source.encoder(bundle.tokenizer, bundle.image_tokens)))
    # Batches of like lengths waste little on padding; the longest first shows at once whether they fit.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["ids"]))
    batches = [order[i : i + source.eval_batch_size] for i in range(0, len(order), source.eval_batch_size)]
    terminal = Console(stderr=True)
    items: dict[int, Row] = {}
    for batch in track(batches, f"scoring {split}", console=terminal, disable=not terminal.is_terminal, transient=True):
        for index, (loss, correct) in zip(batch, _foretold(bundle, [rows[i] for i in batch]), strict=True):
            row = rows[index]
            about = {"id": row["id"], "kind": row["kind"], "tokens": len(_answer_tokens(row)), "loss": loss}
            items[index] = {**about, "correct": correct, "prior": prior.num_correct(row)}
    told = [items[i] for i in range(len(rows))]
    return summarize_likelihood(told, prefix), told


def summarize_likelihood(items: list[Row], prefix: str) -> dict[str, dict[str, float | int]]:
    """Means over tokens.

    Args:
        items: each with `kind`, `tokens`, `correct`, `prior` (counts) and `loss` (the sum over its tokens, in nats).
    """
    scores: dict[str, dict[str, float | int]] = {}
    for kind in ("", *sorted({item["kind"] for item in items})):
        group = [item for item in items if kind in ("", item["kind"])]
        count = sum(item["tokens"] for item in group)
        loss = sum(item["loss"] for item in group) / count
        values = {"loss": loss, "perplexity": math.exp(loss)}
        values |= {
            metric: sum(item[key] for item in group) / count
            for metric, key in [("accuracy", "correct"), ("prior", "prior")]
        }
        for metric, value in values.items():
            scores["/".join(filter(None, (prefix, metric, kind)))] = {"value": value, "count": count}
    return scores


def _encoded(rows: Any, encoder: Encoder) -> list[Row]:
    encoded = []
    for row in rows:
        ids, labels = encoder.conversation(row["questions"], row["answers"])
        encoded.append({"id": row["id"], "kind": row["kinds"][0], "ids": ids, "labels": labels, "pixels": None})
    return [row for row in encoded if _answer_tokens(row)]  # a prompt may fill the length alone


def _answer_tokens(row: Row) -> list[tuple[int, int]]:
    """(token before, token) of every token of the answer."""
    return [(row["ids"][i - 1], token) for i, token in enumerate(row["labels"]) if token != IGNORED and i > 0]


@torch.no_grad()
def _foretold(bundle: ModelBundle, rows: list[Row]) -> list[tuple[float, int]]:
    """(sum of the negative log-likelihoods, likeliest tokens that are right) of each row."""
    device = next(bundle.model.parameters()).device
    batch = {k: v.to(device) for k, v in collate_conversations(rows, bundle.tokenizer.pad_token_id).items()}
    training = bundle.model.training
    bundle.model.eval()
    logits_BPV, wanted_BP = answer_logits(bundle.model, batch)
    bundle.model.train(training)
    take_routings(bundle.model)
    told = []
    for logits_PV, wanted_P in zip(logits_BPV.float(), wanted_BP, strict=True):
        loss = torch.nn.functional.cross_entropy(logits_PV, wanted_P, reduction="sum")
        told.append((loss.item(), int((logits_PV.argmax(-1) == wanted_P).sum())))
    return told
