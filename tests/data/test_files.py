"""Sets of several files, in small but laid out as the real ones."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from ders.data import DigitsVQA, InstructionFiles, LlavaFiles, LlavaMix, by_scale
from ders.data.faults import DataError
from ders.data.loading import Conversations, PixelReader, collate_conversations, sample_lengths, single_questions
from ders.data.source import DataSource
from ders.models.bundle import ModelBundle
from ders.models.tiny import TinyLlava, TinyLM

FIXTURES = ROOT / "tests" / "data" / "fixtures"
STAGES: dict[str, Any] = {
    "pretrain": ["train_json/llava_image_.json"],
    "instruct": [
        "train_json/la_tune_256k.json",
        "train_json/lrv_tune_331k.json",
        "train_json/lvis_tune_220k_.json",
        "train_json/svit_tune_157k.json",
        "train_json/nlp_tune.json",
    ],
    "train": ["train_json/llava_image_tune_.json", "train_json/nlp_tune.json"],
    "test": {"textvqa": "eval/textvqa.json", "pope": "eval/pope.json"},
}
MEDICAL = {"vqa_rad": "3vqa/test_rad.json", "slake": "3vqa/test_slake.json", "pathvqa": "3vqa/test_pathvqa.json"}
TEXT = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SIZES = {"image_size": 16, "patch_size": 8}


def mix(**options: Any) -> LlavaMix:
    root = str(FIXTURES / "moe_llava")
    return LlavaMix(**{"root": root, "splits": STAGES, "split_prompts": {"pretrain": "plain"}, **SIZES, **options})


def medical(**options: Any) -> LlavaMix:
    splits = {
        "pretrain": ["alignment/llava_med_alignment_500k_filter.json"],
        "instruct": ["instruct/llava_med_instruct_60k_inline_mention_filter.json"],
        "train": ["3vqa/train_all.json"],
        "test": MEDICAL,
    }
    folders = {"pretrain": "images", "instruct": "images", "train": "3vqa/images", "test": "3vqa/images"}
    given = {"splits": splits, "image_folders": folders, "split_prompts": {"pretrain": "plain"}, **SIZES}
    return LlavaMix(root=str(FIXTURES / "med_moe"), **given, **options)


def code(name: str, **options: Any) -> InstructionFiles:
    return InstructionFiles(train=str(FIXTURES / "code" / f"{name}.jsonl"), **options)


def taught(bundle: ModelBundle, source: DataSource, prepared: Any, split: str) -> tuple[float, float]:
    """The loss of a split before and after two steps on it."""
    encoder = source.encoder(bundle.tokenizer, bundle.image_tokens, split)
    data = Conversations(prepared.split(split), encoder, PixelReader(prepared.image_root, bundle.pixel_reader))
    batch = collate_conversations([data[i] for i in range(len(data))], bundle.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(bundle.model.parameters(), lr=5e-3)
    losses = []
    for _ in range(3):
        loss = bundle.model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize(
    ("source", "splits"),
    [
        (mix(), ["pretrain", "instruct", "train"]),
        (medical(), ["pretrain", "instruct", "train"]),
        (code("evol_codealpaca_v1"), ["train"]),
        (code("magicoder_evol_instruct_110k"), ["train"]),
    ],
    ids=["moe_llava", "medical", "codealpaca", "magicoder"],
)
def test_every_layout_trains(source: DataSource, splits: list[str], tmp_path: Path) -> None:
    prepared = source.prepare(tmp_path)
    torch.manual_seed(0)
    vision = {**VISION, "num_attention_heads": 2}
    recipe = TinyLM(text=TEXT) if prepared.image_root is None else TinyLlava(text=TEXT, vision=vision, feature_layer=-1)
    bundle = recipe.build(prepared.texts())
    for split in splits:
        before, after = taught(bundle, source, prepared, split)
        assert after < before - 0.1, split


def test_the_stages_of_moe_llava(tmp_path: Path) -> None:
    prepared = mix().prepare(tmp_path)
    rows = {split: len(prepared.split(split)) for split in prepared.files}
    assert rows == {"pretrain": 2, "instruct": 6, "train": 4, "test": 3}
    assert [row["image"] is None for row in prepared.split("train")] == [False, False, True, True]
    assert prepared.split("test")["kinds"] == [["textvqa"], ["pope"], ["pope"]]
    (item,) = single_questions(prepared.split("test")[0])
    assert item["annotations"] == ["stop"] * 8 + ["halt", "go"]
    assert "annotations" not in single_questions(prepared.split("test")[1])[0]


def test_a_split_may_have_its_own_prompt(tmp_path: Path) -> None:
    prepared = mix().prepare(tmp_path)
    bundle = TinyLM(text=TEXT).build(prepared.texts())
    question = prepared.split("pretrain")["questions"][0][0]
    asked = [mix().encoder(bundle.tokenizer, 1, split).prompt(question) for split in ("pretrain", "train")]
    plain, vicuna = map(bundle.tokenizer.decode, asked)
    assert plain == "<s> <image>"
    assert vicuna == "<s> USER : Render a clear and concise summary of the photo . <image> ASSISTANT :"


def test_medical_kinds_are_the_benchmarks(tmp_path: Path) -> None:
    prepared = medical().prepare(tmp_path)
    kinds = [kind for kinds in prepared.split("test")["kinds"] for kind in kinds]
    assert kinds == [f"{name}_{kind}" for name in MEDICAL for kind in ("open", "closed")]
    assert prepared.split("test")["image"][0] == "3vqa/images/synpic54610.jpg"
    assert prepared.split("pretrain")["image"] == ["images/PMC_1_F1.jpg"]
    # The tag after the question, as LLaVA-Med writes it, leaves no line break behind.
    assert single_questions(prepared.split("test")[0])[0]["question"] == "<image>\nWhere is it?"
    assert prepared.split("train")["kinds"] == [["closed"], ["open"], ["open"]]


@pytest.mark.parametrize("name", ["evol_codealpaca_v1", "magicoder_evol_instruct_110k"])
def test_instructions(name: str, tmp_path: Path) -> None:
    source = code(name)
    prepared = source.prepare(tmp_path)
    rows = prepared.split("train")
    assert (source.prompt, source.max_length, prepared.image_root) == ("magicoder", 1024, None)
    assert rows["questions"][0] == ["Write a function that adds two numbers."]
    assert rows["answers"][0] == ["```python\ndef add(a, b):\n    return a + b\n```"]
    assert (rows["questions"][1], rows["image"][1]) == (["Show an < image> tag in HTML."], None)
    assert source.prepare(tmp_path).data_hash == prepared.data_hash


def test_instructions_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "code.jsonl"
    file.write_text('{"instruction": "a", "output": null}\n{"instruction": "b", "output": "x"}\n')
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used:\n  row 0 \(0\): the answer of turn 1 is empty"):
        InstructionFiles(train=str(file)).prepare(tmp_path).split("train")
    assert len(InstructionFiles(train=str(file), on_fault="skip").prepare(tmp_path).split("train")) == 1
    for content, message in [
        ('{"prompt": "a", "answer": "b"}\n', "needs the columns instruction and response or output: it has"),
        ("{not json\n", "cannot be read"),
    ]:
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            InstructionFiles(train=str(file)).prepare(tmp_path)
    with pytest.raises(DataError, match=r"set data\.train=FILE .* or data\.repo=ID"):
        InstructionFiles().prepare(tmp_path)
    with pytest.raises(DataError, match=r"data\.test=/none\.jsonl: no such file"):
        code("evol_codealpaca_v1", test="/none.jsonl").prepare(tmp_path)


def test_instructions_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from ders.data import instructions

    asked: list[Any] = []

    def load(name: str, **options: Any) -> datasets.Dataset:
        asked.append((name, options["split"], options["revision"]))
        return datasets.Dataset.from_list([{"instruction": "a", "response": "b"}])

    monkeypatch.setattr(instructions, "load_dataset", load)
    source = InstructionFiles(repo="ise-uiuc/Magicoder-Evol-Instruct-110K", revision="abc")
    assert source.prepare(tmp_path).split("train")["answers"] == [["b"]]
    source.prepare(tmp_path)
    assert asked == [("ise-uiuc/Magicoder-Evol-Instruct-110K", "train", "abc")]  # once


def test_json_files_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot(repo: str, *, repo_type: str, revision: str | None, allow_patterns: list[str], local_dir: Path) -> str:
        assert (repo, repo_type) == ("LanguageBind/MoE-LLaVA", "dataset")
        for name in allow_patterns:
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(FIXTURES / "moe_llava" / name, local_dir / name)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = mix(root=None, repo="LanguageBind/MoE-LLaVA", images=str(FIXTURES / "moe_llava"))
    prepared = source.prepare(tmp_path)
    assert len(prepared.split("instruct")) == 6
    assert prepared.data_hash == mix().prepare(tmp_path).data_hash

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DataError, match=r"data\.repo=LanguageBind/MoE-LLaVA: cannot be fetched: no network"):
        source.prepare(tmp_path)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set data\.root=DIR to the folder .* or data\.repo=ID and data\.images=DIR"):
        mix(root=None).prepare(tmp_path)
    with pytest.raises(DataError, match=r"data\.root=/none: no such folder"):
        mix(root="/none").prepare(tmp_path)
    with pytest.raises(DataError, match=r"data\.images=.*/pictures: no such folder"):
        mix(images="pictures").prepare(tmp_path)
    with pytest.raises(DataError, match=r"none\.json: no such file. data\.splits\.train names it below /"):
        mix(splits={"train": ["none.json"]}).prepare(tmp_path)
    with pytest.raises(DataError, match=r"data\.splits has no train"):
        mix(splits={"test": STAGES["test"]}).prepare(tmp_path)
    for split, names in {"val": ["none.json"], "test": {**STAGES["test"], "gqa": "none.json"}}.items():
        with pytest.raises(
            DataError, match=rf"none\.json: no such file.* data\.splits\.{split}=null leaves the split out"
        ):
            mix(splits={**STAGES, split: names}).prepare(tmp_path)
    for dial in ("splits", "image_folders", "split_prompts"):
        named = {"splits": {**STAGES, "tset": []}}.get(dial, {"tset": "plain"})
        with pytest.raises(
            ValueError, match=f"{dial} of the data names an unknown split 'tset': choose from train, val,"
        ):
            mix(**{dial: named})


def test_splits_of_earlier_stages_are_missed_when_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = {**STAGES, "pretrain": None, "instruct": ["train_json/nlp_tune.json", "none.json"]}
    with caplog.at_level(logging.WARNING):
        prepared = mix(splits=splits).prepare(tmp_path)
    assert "the instruct split is left out: " in caplog.text
    assert (list(prepared.files), len(prepared.split("train"))) == (["train", "test"], 4)
    with pytest.raises(
        DataError, match=r"no instruct split: .*none\.json: no such file. data\.splits\.instruct names it"
    ):
        prepared.split("instruct")
    with pytest.raises(DataError, match="this data has no pretrain split: it has train, test"):
        prepared.split("pretrain")


def test_data_without_a_test_split_says_that_no_score_will_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = str(FIXTURES / "moe_llava" / "train_json" / "nlp_tune.json")
    for source, dial in [
        (mix(splits={**STAGES, "test": None}), r"set data.splits.test={BENCHMARK: FILE}"),
        (LlavaFiles(train=text), "set data.test=FILE"),
        (code("evol_codealpaca_v1"), "set +data.test=FILE"),
    ]:
        caplog.clear()
        source.prepare(tmp_path)
        assert caplog.messages == [f"no test split: this run will have no score; {dial}"]
    caplog.clear()
    for source in (mix(), LlavaFiles(train=text, test=text)):
        source.prepare(tmp_path)
    assert caplog.messages == []


def test_words_are_read_without_images_and_past_faulty_rows(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "moe_llava", tmp_path / "set")
    (tmp_path / "set" / "llava_image_tune" / "coco" / "train2017" / "000000033471.jpg").write_text("no picture")
    prepared = mix(root=str(tmp_path / "set")).prepare(tmp_path)
    assert prepared.readable("train")["id"] == mix().prepare(tmp_path).split("train")["id"]
    file = tmp_path / "set" / "train_json" / "nlp_tune.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps([{"id": "bad"}, *good[1:]]))
    assert len(prepared.readable("train")) == 3
    with pytest.raises(DataError, match="this data has no val split"):
        prepared.readable("val")


def test_one_configuration_holds_both_scales(tmp_path: Path) -> None:
    sources = {"tiny": DigitsVQA(), "paper": LlavaMix(splits=STAGES)}
    tiny = by_scale(scale="tiny", **sources, image_size=16, patch_size=8)
    paper = by_scale(scale="paper", **sources, image_size=336, patch_size=14)
    assert isinstance(tiny, DigitsVQA)
    assert isinstance(paper, LlavaMix)
    assert (paper.image_size, paper.patch_size) == (336, 14)
    with pytest.raises(DataError, match=r"set data\.paper\.root=DIR"):
        paper.prepare(tmp_path)
    with pytest.raises(ValueError, match="scale must be tiny or paper: got 'huge'"):
        by_scale(scale="huge", **sources)


def test_faulty_rows_are_skipped_where_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(FIXTURES / "moe_llava", tmp_path / "set")
    file = tmp_path / "set" / "train_json" / "nlp_tune.json"
    good = json.loads(file.read_text())
    bad = {"id": "bad", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": " "}]}
    file.write_text(json.dumps([bad, *good]))
    source = {"root": str(tmp_path / "set")}
    with pytest.raises(DataError, match=r"1 of 3 rows cannot be used:\n  row 0 \(bad\): the answer of turn 1 is empty"):
        mix(**source).prepare(tmp_path).split("train")
    with caplog.at_level(logging.WARNING):
        assert len(mix(**source, on_fault="skip").prepare(tmp_path).split("train")) == 4
    assert "1 of 3 rows cannot be used and are skipped:\n  row 0 (bad)" in caplog.text
    with pytest.raises(ValueError, match=r"data\.on_fault must be refuse or skip: got 'drop'"):
        mix(on_fault="drop")


def test_images_left_unchecked_are_told_when_reached(tmp_path: Path, llava_model: ModelBundle) -> None:
    shutil.copytree(FIXTURES / "moe_llava", tmp_path / "set")
    (tmp_path / "set" / "llava_image_tune" / "coco" / "train2017" / "000000033471.jpg").write_text("no picture")
    with pytest.raises(DataError, match="unreadable"):
        mix(root=str(tmp_path / "set")).prepare(tmp_path).split("train")
    prepared = mix(root=str(tmp_path / "set"), check_images=False).prepare(tmp_path)
    rows = prepared.split("train")
    assert len(rows) == 4
    encoder = mix().encoder(llava_model.tokenizer, llava_model.image_tokens)
    data = Conversations(rows, encoder, PixelReader(prepared.image_root, llava_model.pixel_reader))
    assert data[1]["pixels"].shape == (3, 16, 16)
    with pytest.raises(DataError, match=r"row 0 \(000000033471\): llava_image_tune/.*: unreadable"):
        data[0]


def test_lengths_and_modalities(tmp_path: Path) -> None:
    rows = mix().prepare(tmp_path).split("train")
    expected = [
        (row["image"] is not None, sum(len(t.split()) for t in [*row["questions"], *row["answers"]])) for row in rows
    ]
    assert sample_lengths(rows) == expected
    assert expected[3] == (False, 6)  # What is two and two? Four.
