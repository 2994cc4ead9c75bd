"""What the harnesses are given, and what they are held against."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch

import ders
from ders.cli.app import composed
from ders.cli.instantiation import instantiate
from ders.data import DataSource, PreparedData
from ders.data.conversation import PROMPTS
from ders.models.bundle import ModelBundle, save_bundle

# Long enough to learn which kind of answer a question has, and little more.
LEARNING = ["stage.finetune.max_steps=24", "stage.moe.max_steps=4", "method=ders_sm", "sparsity=0.99"]
DATA = ["data.num_train=300", "data.num_val=8", "data.num_test=50"]


def data_of(name: str, outputs: Path) -> tuple[DataSource, PreparedData]:
    source = instantiate(composed("train", [f"data={name}", *DATA]).data)
    return source, source.prepare(outputs / "cache")


def written(bundle: ModelBundle, folder: Path, prompt: str) -> Path:
    """A folder of a model upcycled and compressed to 2 bits, trained in that prompt by its own account."""
    for parameter in bundle.model.parameters():
        parameter.data.normal_(std=0.2)
    dense = copy.deepcopy(bundle.model)
    ders.upcycle(bundle.model, layers="all")
    for parameter in bundle.model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    ders.compress(bundle.model, dense, delta=functools.partial(ders.QuantizedDelta, bits=2))
    save_bundle(bundle, folder, {"prompt": vars(PROMPTS[prompt])})
    return folder


def log_likelihoods(model: Any, prompts: list[list[int]], answers: list[list[int]], **inputs: Any) -> list[list[float]]:
    """Of each answer token after its prompt, one row at a time: the oracle of what a harness is given."""
    found = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer]), **one).logits[0].double().log_softmax(-1)
        found.append([float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(answer)])
    return found
