"""Batches of one modality, from files of both to the indices of a step."""

import functools
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT

from ders.data import LlavaMix
from ders.data.loading import sample_lengths
from ders.models.bundle import ModelBundle
from ders.training.batches import StepBatches
from ders.training.stages import LanguageStage


def mixed() -> LlavaMix:
    return LlavaMix(
        root=str(ROOT / "tests" / "data" / "fixtures" / "moe_llava"),
        splits={"train": ["train_json/llava_image_tune_.json", "train_json/nlp_tune.json"]},
        image_size=16,
        patch_size=8,
    )


def stage(**options: Any) -> LanguageStage:
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)
    return LanguageStage(
        trainable="all", global_batch_size=2, max_steps=16, optimizer=optimizer, schedule=lambda *_: None, **options
    )


def test_a_step_has_images_or_none(tmp_path: Path, llava_model: ModelBundle) -> None:
    source = mixed()
    prepared = source.prepare(tmp_path)
    data = stage(group_by_modality_length=True).data(llava_model, source, prepared)
    rows = prepared.split("train")
    assert data.lengths == sample_lengths(rows)
    batches = list(StepBatches(len(rows), 2, 16, lengths=data.lengths))
    assert len(batches) == 16
    pictured = [[rows[index]["image"] is not None for index in batch] for batch in batches]
    assert all(len(set(batch)) == 1 for batch in pictured)
    assert {batch[0] for batch in pictured} == {True, False}
    for batch, (has_image, _) in zip(batches[:4], pictured, strict=False):
        inputs = data.collate([data.train[index] for index in batch])
        assert ("pixel_values" in inputs) == has_image
    # Without the grouping the same steps mix them.
    plain = stage().data(llava_model, source, prepared)
    assert plain.lengths is None
    ungrouped = [[rows[i]["image"] is not None for i in batch] for batch in StepBatches(len(rows), 2, 16)]
    assert any(len(set(batch)) == 2 for batch in ungrouped)
