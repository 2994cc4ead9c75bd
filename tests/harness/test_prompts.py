"""The prompt that a harness asks a model in."""

from pathlib import Path

import pytest
from harness_cases import written

from ders.data.conversation import PROMPTS
from ders.harness.prompts import prompt_for
from ders.models.bundle import ModelBundle, load_bundle


def test_the_prompt_of_training_is_found_again(llava_model: ModelBundle, tmp_path: Path) -> None:
    assert prompt_for(llava_model.model) == PROMPTS["vicuna"]  # dense: nothing is recorded
    model = load_bundle(written(llava_model, tmp_path / "model", "llava_v1")).model
    assert prompt_for(model) == PROMPTS["llava_v1"]
    assert prompt_for(model, "magicoder") == PROMPTS["magicoder"]
    with pytest.raises(ValueError, match="prompt must be one of vicuna, "):
        prompt_for(model, "alpaca")


def test_an_unknown_record_is_not_acted_on(llava_model: ModelBundle, tmp_path: Path) -> None:
    model = load_bundle(written(llava_model, tmp_path / "model", "vicuna")).model
    model.config.quantization_config.section["provenance"]["prompt"]["question"] = "{0.__class__}"
    with pytest.raises(ValueError, match=r"choose prompt=vicuna\|"):
        prompt_for(model)
