"""ders models in lmms-eval: the tokens and images it sends, the likelihoods it sees, and the score it gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_cases import DATA, LEARNING, data_of, log_likelihoods, written
from PIL import Image

from ders.data.conversation import PROMPTS, Encoder
from ders.evaluation.scoring import score
from ders.harness.tasks import write_task
from ders.models.bundle import ModelBundle, load_bundle

pytestmark = pytest.mark.slow

# Of the paper's table 1; MM-Vet's temperature is without effect, for it switches sampling off.
BENCHMARKS = {
    "vqav2/vqav2_val.yaml": [16, []],
    "gqa/gqa.yaml": [16, []],
    "vizwiz_vqa/vizwiz_vqa_val.yaml": [1024, ["ASSISTANT:"]],
    "scienceqa/scienceqa_img.yaml": [16, []],
    "textvqa/textvqa_val.yaml": [1024, ["ASSISTANT:"]],
    "pope/pope.yaml": [128, []],
    "mmbench/mmbench_en_dev.yaml": [1024, ["ASSISTANT:"]],
    "mmvet/mmvet.yaml": [1024, []],
}
SAMPLED = [{"do_sample": True}, {"temperature": 0.7}, {"num_beams": 5}]


def test_tokens_images_and_likelihoods(llava_model: ModelBundle, probe: Callable[..., Any], tmp_path: Path) -> None:
    folder = written(llava_model, tmp_path / "model", "llava_v1")
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        Image.effect_noise((16, 16), 20 + 50 * number).save(file)
    docs = [
        {"question": "what is it?", "answer": "it is 7", "image": str(files[0])},
        {"question": "<image> is it?", "answer": "7", "image": str(files[1])},
        {"question": "what is 7?", "answer": "what", "image": None},
    ]
    given = {"folder": str(folder), "docs": docs, "lengths": [3, 3, 5]}
    told = probe("lmms-eval", {**given, "benchmarks": list(BENCHMARKS), "sampled": SAMPLED})
    assert told["model"] == "DersLMM"
    bundle = load_bundle(folder)
    encoder = Encoder(bundle.tokenizer, bundle.image_tokens, PROMPTS["llava_v1"])
    prompts = [encoder.prompt(question) for question in ("<image>\nwhat is it?", "<image> is it?", "what is 7?")]
    assert told["ids"] == prompts
    pixels = torch.stack([bundle.pixel_reader(Image.open(file).convert("RGB")) for file in files[:2]])
    answers = [bundle.tokenizer(doc["answer"], add_special_tokens=False)["input_ids"] for doc in docs]
    seen = log_likelihoods(bundle.model, prompts[:2], answers[:2], pixel_values=pixels)
    expected = seen + log_likelihoods(bundle.model, prompts[2:], answers[2:])
    losses = [-sum(tokens) / len(tokens) for tokens in expected]
    assert [pair[0] for pair in told["loglikelihood"]] == pytest.approx(losses, rel=1e-5)
    assert told["of_the_doc"] == told["loglikelihood"]
    alone = []
    for place, (prompt, longest) in enumerate(zip(prompts, given["lengths"], strict=True)):
        images = {"pixel_values": pixels[place : place + 1]} if place < 2 else {}
        ids = bundle.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=longest, do_sample=False, **images)
        alone.append(bundle.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip())
    assert told["answers"] == alone
    assert told["benchmarks"] == BENCHMARKS
    assert all("answers are greedy here" in message for message in told["refusals"])


def test_its_score_is_ours(
    run_job: Callable[..., Path], harness: Callable[..., str], outputs: Path, tmp_path: Path
) -> None:
    folder = run_job("data=digits_vqa", "stage.tower.max_steps=20", *LEARNING, data=DATA) / "model"
    source, prepared = data_of("digits_vqa", outputs)
    ours = score(load_bundle(folder), source, prepared, "test", "test")
    about = write_task(tmp_path / "task", "digits_vqa", source, prepared)
    harness(
        "lmms-eval", "-m", "lmms_eval", "--model", "ders", "--model_args", f"pretrained={folder}",
        "--tasks", about["task"], "--include_path", str(tmp_path / "task"), "--batch_size", "64",
        "--output_path", str(tmp_path / "results"), "--log_samples",
    )  # fmt: skip
    (results,) = (tmp_path / "results").rglob("*results.json")
    theirs = json.loads(results.read_text())["results"][about["task"]]["exact_match,none"]
    assert 0.05 < theirs < 0.95
    assert theirs == pytest.approx(ours.metrics["test/accuracy"]["value"], abs=1e-12)
    (samples,) = (tmp_path / "results").rglob("*samples*.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    assert answers == [item["prediction"] for item in ours.predictions]
