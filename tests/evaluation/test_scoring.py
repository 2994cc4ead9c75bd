import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from ders.data import LlavaMix, PreparedData
from ders.data.faults import DataError
from ders.data.metrics import is_correct
from ders.data.scores import closed_accuracy
from ders.evaluation.scoring import score
from ders.models.bundle import ModelBundle
from ders.models.tiny import TinyLlava

FIXTURE = ROOT / "tests" / "data" / "fixtures" / "med_moe" / "3vqa"


def test_scores_are_those_of_the_written_folder(run_job: Callable[..., Path]) -> None:
    folder = run_job("seed=8")
    record = json.loads((folder / "record.json").read_text())
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
    assert len(predictions) == 48  # 8 images, 6 questions each
    for metric, field in [("accuracy", "prediction"), ("prior", "prior")]:
        correct = [is_correct(p[field], p["answer"]) for p in predictions]
        assert record["metrics"][f"test/{metric}"] == {"value": pytest.approx(sum(correct) / 48), "count": 48}
    assert record["metrics"]["test/accuracy/sum"]["count"] == 8


def medical(folder: Path) -> LlavaMix:
    return LlavaMix(
        root=str(folder),
        splits={"train": ["train_all.json"], "test": {"vqa_rad": "test_rad.json", "slake": "test_slake.json"}},
        images="images",
        scorers={"*_open": "open_recall", "*_closed": "closed_accuracy"},
        prompt="plain",
        max_answer_tokens=2,
    )


def model(prepared: PreparedData) -> ModelBundle:
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    torch.manual_seed(0)
    recipe = TinyLlava(text=text | heads | {"num_key_value_heads": 2}, vision=vision | heads, feature_layer=-1)
    return recipe.build(prepared.texts())


def test_the_datas_own_scorers_stand_beside_the_accuracy(tmp_path: Path) -> None:
    source = medical(FIXTURE)
    prepared = source.prepare(tmp_path)
    scored = score(model(prepared), source, prepared, "test", "test")
    assert {key.removeprefix("test/") for key in scored.metrics if "accuracy" not in key and "prior" not in key} == {
        "open_recall/vqa_rad_open",
        "open_recall/slake_open",
        "score",
    }
    for item in scored.predictions:
        if item["kind"] == "slake_closed":
            value = closed_accuracy(item["prediction"], item["answer"])
            assert scored.metrics["test/closed_accuracy/slake_closed"] == {"value": value, "count": 1}
    assert scored.metrics["test/accuracy"]["count"] == 4


def test_faults_of_the_training_split_stop_no_score_of_another(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "set")
    source = medical(tmp_path / "set")
    prepared = source.prepare(tmp_path)
    bundle = model(prepared)
    (tmp_path / "set" / "images" / "train_0422.jpg").write_text("no picture")  # training's alone
    file = tmp_path / "set" / "train_all.json"
    file.write_text(json.dumps([{"id": "bad"}, *json.loads(file.read_text())]))
    with pytest.raises(DataError, match="2 of 4 rows cannot be used"):
        prepared.split("train")
    kinds = {item["kind"]: item["prior"] for item in score(bundle, source, prepared, "test", "test").predictions}
    # Of the four kinds training has met only open and closed.
    assert kinds == {
        **{f"{name}_closed": "Yes" for name in ("vqa_rad", "slake")},
        **{f"{name}_open": "MRI" for name in ("vqa_rad", "slake")},
    }
