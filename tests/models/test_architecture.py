"""The paper's six architectures: shapes at real size, small twins, and real loading from folders a test writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.test_qwen1 import CONFIG as QWEN1
from models.test_qwen1 import qwen1_logits, qwen1_tensors, write_qwen1
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from ders.cli.app import composed, prepare_hydra
from ders.cli.instantiation import instantiate
from ders.models.architecture import LanguageArchitecture, LlavaArchitecture
from ders.models.bundle import IMAGE_TOKEN, load_bundle, save_bundle
from ders.models.generation import generate_answers
from ders.models.llava import fold_head_bias
from ders.models.tiny import TinyLM
from ders.upcycling import find_decoder

# Parameters of the language model (Phi's with the bias of its head), hidden and FFN width, layers.
STABLELM, PHI = (1_644_515_328, 2048, 5632, 24), (2_779_683_840, 2560, 10240, 32)
LANGUAGE = {
    "moe_llava_stablelm": STABLELM,
    "moe_llava_qwen": (1_836_828_672, 2048, 5504, 24),
    "moe_llava_phi": PHI,
    "med_moe_stablelm": STABLELM,
    "med_moe_phi": PHI,
    "coder_moe": (1_346_471_936, 2048, 5504, 24),
}
# CLIP-L/14-336 by hand: class token, 14 px patches of 3 colours, 24² + 1 positions, two LayerNorms outside the layers;
# in each of 24 layers four attention matrices and two of the FFN with their biases, and two LayerNorms.
TOWER = (
    (1024 + 1024 * 3 * 14 * 14 + 577 * 1024 + 2 * 2048)
    + 24 * (4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 2 * 2048)
)  # fmt: skip
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "it", "the", "a", "left", "right", "seven", "USER", "it's", ":"]
SHAPES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 24,
}
VISION = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOKENS = torch.tensor([[4, 5, 6, 9, 11, 7]])


def num_params(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def recipe(name: str, scale: str, *overrides: str) -> Any:
    prepare_hydra()
    return instantiate(composed("train", [f"model={name}", f"scale={scale}", *overrides]).model)


@pytest.mark.parametrize("name", LANGUAGE)
def test_real_size_has_the_known_shapes(name: str) -> None:
    architecture, (total, hidden, ffn, layers) = recipe(name, "paper"), LANGUAGE[name]
    assert (architecture.name, architecture.pretrained) == (name, True)
    with torch.device("meta"):
        model = architecture.dense()
        language = AutoModelForCausalLM.from_config(model.config.get_text_config())
    assert num_params(language) == total
    _, decoder, family = find_decoder(model)
    assert len(decoder.layers) == layers
    for matrix in family.ffn.inputs:
        assert getattr(decoder.layers[-1].mlp, matrix).weight.shape == (ffn, hidden)
    assert getattr(decoder.layers[-1].mlp, family.ffn.output).weight.shape == (hidden, ffn)
    if architecture.has_images:
        tower, projector = model.model.vision_tower, model.model.multi_modal_projector
        assert num_params(tower) == TOWER == 303_507_456
        assert num_params(projector) == 1024 * hidden + hidden + hidden * hidden + hidden
        assert model.config.vision_feature_layer == -2


@pytest.mark.parametrize("name", LANGUAGE)
def test_tiny_twin_is_of_the_same_family_and_answers(name: str) -> None:
    torch.manual_seed(0)
    data = ["data=digits_text"] if name == "coder_moe" else []
    twin = recipe(name, "tiny", *data)
    assert twin.text["model_type"] == recipe(name, "paper").text["model_type"]
    twin.verify()  # offline: random weights need no folder
    bundle = twin.build(["USER: what is it? ASSISTANT: seven"])
    assert bundle.model.config.get_text_config().vocab_size == len(bundle.tokenizer)
    prompt = f"USER: {IMAGE_TOKEN * bundle.image_tokens} what is it? ASSISTANT:"
    inputs = dict(bundle.tokenizer([prompt], return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    if bundle.pixel_reader is not None:
        inputs["pixel_values"] = bundle.pixel_reader(Image.new("RGB", (16, 16), "red"))[None]
    with torch.no_grad():
        assert torch.isfinite(bundle.model(**inputs).logits).all()
    assert len(generate_answers(bundle.model, bundle.tokenizer, inputs, max_new_tokens=3)) == 1


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_language(folder: Path, model_type: str, **shapes: int) -> Any:
    """A folder as the Hub holds one: a random model, all its biases other than zero, and a tokenizer without a pad."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPES | shapes, eos_token_id=2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.5 if name == "lm_head.bias" else 0.1))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_tower(folder: Path, *, pickled: bool = False) -> CLIPModel:
    """A whole CLIP, text half included, with the preprocessor's file in the Hub's old form."""
    torch.manual_seed(2)
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text | {"vocab_size": 50}, projection_dim=8)).eval()
    clip.save_pretrained(folder)
    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    preprocessor = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 16,
        "crop_size": 16,
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "resample": 3,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.25, 0.25, 0.25],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return clip


def llava(tmp_path: Path, model_type: str, **changes: Any) -> LlavaArchitecture:
    given: dict[str, Any] = {
        "name": "moe_llava_phi",
        "llm": str(tmp_path / "llm"),
        "vision_tower": str(tmp_path / "clip"),
        "pretrained": True,
        "text": {"model_type": model_type, **SHAPES},
        "vision": VISION,
        "feature_layer": -2,
    }
    return LlavaArchitecture(**given | changes)


@pytest.mark.parametrize("model_type", ["stablelm", "phi", "qwen2", "llama"])
def test_loaded_parts_compute_what_their_folders_do(tmp_path: Path, model_type: str) -> None:
    own, clip = (
        write_language(tmp_path / "llm", model_type),
        write_tower(tmp_path / "clip", pickled=model_type == "phi"),
    )
    bundle = llava(tmp_path, model_type).build([])
    assert not any(tensor.is_meta for tensor in [*bundle.model.parameters(), *bundle.model.buffers()])
    assert {parameter.dtype for parameter in bundle.model.parameters()} == {torch.float32}
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        logits = bundle.model(input_ids=TOKENS).logits
        features = bundle.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        expected = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(logits, own(TOKENS).logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("model_type", ["phi", "stablelm"])
def test_loaded_llava_survives_its_folder(tmp_path: Path, model_type: str) -> None:
    write_language(tmp_path / "llm", model_type)
    write_tower(tmp_path / "clip")
    bundle = llava(tmp_path, model_type).build([])
    save_bundle(bundle, tmp_path / "saved")
    again = load_bundle(tmp_path / "saved")
    assert again.image_tokens == 4
    image = Image.new("RGB", (20, 10), "red")
    assert bundle.pixel_reader is not None
    assert again.pixel_reader is not None
    pixels = bundle.pixel_reader(image)
    torch.testing.assert_close(again.pixel_reader(image), pixels)
    inputs = bundle.tokenizer([f"what {IMAGE_TOKEN * 4} is it"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = bundle.model(input_ids=inputs, pixel_values=pixels[None]).logits
        torch.testing.assert_close(again.model(input_ids=inputs, pixel_values=pixels[None]).logits, expected)


def test_image_token_takes_a_spare_row(tmp_path: Path) -> None:
    write_language(tmp_path / "llm", "llama")
    write_tower(tmp_path / "clip")
    bundle = llava(tmp_path, "llama").build([])
    assert bundle.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == len(WORDS) == bundle.model.config.image_token_id
    assert bundle.tokenizer(f"it {IMAGE_TOKEN}{IMAGE_TOKEN} is")["input_ids"] == [6, len(WORDS), len(WORDS), 5]
    assert bundle.model.get_input_embeddings().weight.shape == (SHAPES["vocab_size"], 32)
    assert bundle.tokenizer.pad_token == "</s>"


def test_image_token_without_a_spare_row_adds_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = write_language(tmp_path / "llm", "phi", vocab_size=len(WORDS))
    write_tower(tmp_path / "clip")
    text = {"model_type": "phi", **SHAPES, "vocab_size": len(WORDS)}
    with caplog.at_level("INFO"):
        bundle = llava(tmp_path, "phi", text=text).build([])
    assert f"{len(WORDS)} rows -> {len(WORDS) + 1}" in caplog.text
    assert bundle.model.config.text_config.vocab_size == len(WORDS) + 1
    with torch.no_grad():
        logits = bundle.model(input_ids=TOKENS).logits[..., : len(WORDS)]
        torch.testing.assert_close(logits, own(TOKENS).logits, rtol=0, atol=2e-5)


def test_images_are_padded_with_the_mean_colour(tmp_path: Path) -> None:
    write_language(tmp_path / "llm", "llama")
    write_tower(tmp_path / "clip")
    reader = llava(tmp_path, "llama").build([]).pixel_reader
    assert reader is not None
    values = reader(Image.new("RGB", (16, 8), "white"))
    assert values.shape == (3, 16, 16)
    # Mean colour is zero once normalised, up to the rounding of a byte; white is (1 − mean) / std.
    assert values[:, 0].abs().max() < 0.02
    torch.testing.assert_close(values[:, 8, 8], (1 - torch.tensor([0.4, 0.5, 0.6])) / 0.25, rtol=0, atol=1e-5)
    cropped = llava(tmp_path, "llama", pad_images=False).build([]).pixel_reader
    assert cropped is not None
    assert cropped(Image.new("RGB", (16, 8), "white"))[:, 0].min() > 1


def test_language_model_alone(tmp_path: Path) -> None:
    own = write_language(tmp_path / "llm", "llama")
    text = {"model_type": "llama", **SHAPES}
    bundle = LanguageArchitecture(name="coder_moe", llm=str(tmp_path / "llm"), pretrained=True, text=text).build([])
    with torch.no_grad():
        assert torch.equal(bundle.model(TOKENS).logits, own(TOKENS).logits)
    assert IMAGE_TOKEN not in bundle.tokenizer.get_vocab()


def test_first_qwen_is_recognised(tmp_path: Path) -> None:
    tensors = qwen1_tensors()
    folder = write_qwen1(tmp_path / "llm", tensors)
    (folder / "config.json").write_text(json.dumps(QWEN1))
    write_tokenizer(tmp_path / "tokenizer")
    text = {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "vocab_size": 37}
    architecture = LanguageArchitecture(
        name="moe_llava_qwen", llm=str(folder), tokenizer=str(tmp_path / "tokenizer"), pretrained=True, text=text
    )
    bundle = architecture.build([])
    save_bundle(bundle, tmp_path / "saved")
    for model in (bundle.model, load_bundle(tmp_path / "saved").model):
        with torch.no_grad():
            logits = model(TOKENS).logits[0].double()
        torch.testing.assert_close(logits, qwen1_logits(tensors, TOKENS[0]), rtol=0, atol=1e-4)


def test_head_bias_is_folded_exactly() -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", **SHAPES)).double().eval()
    norm = model.model.final_layernorm
    with torch.no_grad():
        model.lm_head.bias.normal_()
        norm.weight.normal_()
        norm.bias.normal_()
        expected = model(TOKENS).logits
        fold_head_bias(model)
        assert model.lm_head.bias is None
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-10)


def test_wrong_model_is_refused_by_every_shape_that_differs(tmp_path: Path) -> None:
    write_language(tmp_path / "llm", "phi")
    write_tower(tmp_path / "clip")
    text = {"model_type": "phi", **SHAPES, "hidden_size": 2560, "num_hidden_layers": 32}
    with pytest.raises(ValueError, match=r"hidden_size is 32, model=moe_llava_phi has 2560; num_hidden_layers is 2, "):
        llava(tmp_path, "phi", text=text).verify()
    with pytest.raises(ValueError, match=r"model_type is phi, model=moe_llava_phi has stablelm"):
        llava(tmp_path, "stablelm").build([])
    with pytest.raises(ValueError, match=r"vision_tower=.*: patch_size is 8, model=moe_llava_phi has 14"):
        llava(tmp_path, "phi", vision=VISION | {"patch_size": 14}).verify()


def test_verify_reads_no_weight(tmp_path: Path) -> None:
    write_language(tmp_path / "llm", "phi")
    write_tower(tmp_path / "clip")
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    llava(tmp_path, "phi").verify()
    with pytest.raises(ValueError, match=r"model\.llm=.*llm"):
        llava(tmp_path, "phi").build([])


@pytest.mark.parametrize("source", ["/nowhere/phi-2", "microsoft/phi-2"])
def test_what_cannot_be_reached_says_what_to_set(tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.llm={source}: .* say model\.llm=DIR"):
        llava(tmp_path, "phi", llm=source).verify()
    write_language(tmp_path / "llm", "phi")
    with pytest.raises(ValueError, match=rf"model\.vision_tower={source}: .* say model\.vision_tower=DIR"):
        llava(tmp_path, "phi", vision_tower=source).verify()


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write_language(tmp_path / "llm", "llama")
    write_tokenizer(tmp_path / "other", [*WORDS, *(f"word{i}" for i in range(20))])
    architecture = LanguageArchitecture(
        name="coder_moe",
        llm=str(tmp_path / "llm"),
        tokenizer=str(tmp_path / "other"),
        pretrained=True,
        text={"model_type": "llama", **SHAPES},
    )
    with pytest.raises(ValueError, match=r"tokenizer=.*other: has 35 tokens, and model\.llm=.* has 24"):
        architecture.build([])


def test_folder_without_some_weights_is_refused(tmp_path: Path) -> None:
    model = write_language(tmp_path / "llm", "llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path / "llm", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks the weights of .*layers\.1\.mlp\.up_proj"):
        LanguageArchitecture(
            name="coder_moe", llm=str(tmp_path / "llm"), pretrained=True, text={"model_type": "llama", **SHAPES}
        ).build([])


def test_given_vocabulary_wins_and_must_hold_the_words() -> None:
    text = {"model_type": "llama", **SHAPES}
    assert TinyLM(text=text).build(["a b"]).model.config.vocab_size == SHAPES["vocab_size"]
    with pytest.raises(ValueError, match=r"model\.text\.vocab_size, now 24"):
        TinyLM(text=text).build([" ".join(f"word{i}" for i in range(20))])
