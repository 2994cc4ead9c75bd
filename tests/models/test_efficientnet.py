"""The convolutional tower: against the network its weights were published with, alone and inside a LLaVA."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from transformers import AutoModel

from ders import upcycle
from ders.data.conversation import Encoder
from ders.models.bundle import ModelBundle, load_bundle, save_bundle
from ders.models.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel, published_names
from ders.models.generation import generate_answers
from ders.models.tiny import TinyLlava
from ders.models.towers import tower_of
from ders.training.modules import LanguageModule

TEXT = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def published() -> Any:
    """The oracle, with random weights and statistics."""
    torch.manual_seed(0)
    return with_statistics(EfficientNet.from_name("efficientnet-lite0").eval())


def with_statistics(network: Any) -> Any:
    """The network as if it had been trained: batch normalisation's statistics are not those it begins with."""
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return network


@pytest.fixture(scope="module")
def tower(published: Any) -> EfficientNetLiteModel:
    ours = EfficientNetLiteModel(EfficientNetLiteConfig())
    ours.load_state_dict(published_names(published.state_dict()))
    return ours.eval()


@torch.no_grad()
def test_a_large_batch_goes_through_in_parts(tower: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 3, 64, 64)
    whole = tower(x).last_hidden_state
    seen = []
    tower.stem.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr("ders.models.efficientnet._IMAGES_AT_ONCE", 3)
    torch.testing.assert_close(tower(x).last_hidden_state, whole)
    tower.stem._forward_pre_hooks.clear()
    assert seen == [3, 3, 1]


def test_features_and_gradients_are_those_of_the_published_network(published: Any, tower: Any) -> None:
    theirs, ours = copy.deepcopy(published).double(), copy.deepcopy(tower).double()
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64, requires_grad=True)
    expected = theirs.extract_features(x).flatten(2).transpose(1, 2)
    found = ours(x).last_hidden_state
    assert found.shape == (2, 49, 1280)
    assert torch.allclose(found, expected, rtol=1e-10)
    (wanted,) = torch.autograd.grad(expected.square().mean(), x)
    (got,) = torch.autograd.grad(found.square().mean(), x)
    assert torch.allclose(got, wanted, rtol=1e-8)


def test_it_never_learns_statistics(tower: Any) -> None:
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    tower.train()
    assert not tower.training
    tower(torch.randn(1, 3, 64, 64))
    assert all(torch.equal(before[name], buffer) for name, buffer in tower.named_buffers())


def test_a_folder_loads_as_any_other(tower: Any, tmp_path: Path) -> None:
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(again(x).last_hidden_state, tower(x).last_hidden_state)
    assert again(x).last_hidden_state.shape == (1, 2 * 3, 1280)


def test_pixels_are_scaled_as_the_network_was_trained() -> None:
    process = tower_of({"model_type": "efficientnet_lite"}).image_processor(224)
    values = process(images=Image.new("RGB", (64, 64), (255, 127, 0)), return_tensors="pt")["pixel_values"][0]
    assert values.shape == (3, 224, 224)
    assert values[:, 0, 0].tolist() == pytest.approx([128 / 128, 0.0, -127 / 128], abs=1e-6)


@pytest.fixture
def llava() -> ModelBundle:
    vision = {"model_type": "efficientnet_lite", "image_size": 64, "patch_size": 32, "hidden_size": 1280}
    torch.manual_seed(0)
    bundle = TinyLlava(text=TEXT, vision=vision, feature_layer=-1).build(["what is it", "seven"])
    with_statistics(bundle.model)
    return bundle


@pytest.mark.parametrize("num_experts", [0, 2])
def test_statistics_survive_saving_and_loading(llava: ModelBundle, num_experts: int, tmp_path: Path) -> None:
    if num_experts:
        upcycle(llava.model, num_experts=num_experts, top_k=1)
    save_bundle(llava, tmp_path / "model")
    expected, found = llava.model.state_dict(), load_bundle(tmp_path / "model").model.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_llava_reads_every_place_of_the_picture(llava: ModelBundle, tmp_path: Path) -> None:
    assert llava.image_tokens == 4  # no class token to leave out
    upcycle(llava.model, num_experts=2, top_k=1)
    llava.model.eval()
    assert llava.pixel_reader is not None
    pixels = llava.pixel_reader(Image.new("RGB", (20, 20), (9, 99, 200)))[None]
    ids = Encoder(llava.tokenizer, llava.image_tokens).prompt("<image>\nwhat is it")
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)), "pixel_values": pixels}
    assert len(generate_answers(llava.model, llava.tokenizer, inputs, 3)) == 1
    save_bundle(llava, tmp_path / "model")
    again = load_bundle(tmp_path / "model")
    assert again.image_tokens == 4
    assert torch.equal(again.model(**inputs).logits, llava.model(**inputs).logits)
    # What transformers' own processor makes of it is what ours does.
    told = again.processor(images=Image.new("RGB", (20, 20)), text="<image>", return_tensors="pt")
    assert (told["input_ids"] == again.model.config.image_token_id).sum() == 4


def test_training_a_llava_leaves_its_tower_in_evaluation(llava: ModelBundle) -> None:
    from conftest import language_module

    module: LanguageModule = language_module(llava)
    module.train()
    assert llava.model.training
    assert not any(part.training for part in llava.model.model.vision_tower.modules())
