"""Prepared data as a task of a harness."""

import json
from pathlib import Path

import pytest
import yaml

from ders.checkpoint import ModelFolderError
from ders.data import DigitsVQA, LlavaFiles
from ders.data.loading import single_questions
from ders.harness.tasks import pictures, write_task


class Loader(yaml.SafeLoader):
    """Reads the tag of the harness as the name behind it."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.mark.parametrize("images", [False, True])
def test_a_split_as_a_task(images: bool, tmp_path: Path) -> None:
    source = DigitsVQA(num_train=4, num_val=2, num_test=3, images=images, max_answer_tokens=4)
    prepared = source.prepare(tmp_path)
    about = write_task(tmp_path / "task", "digits", source, prepared)
    name = "ders_digits_test"
    assert about == {"harness": "lmms-eval" if images else "lm-eval", "task": name, "num_questions": 18}
    docs = [json.loads(line) for line in (tmp_path / "task" / f"{name}.jsonl").read_text().splitlines()]
    items = [item for row in prepared.split("test") for item in single_questions(row)]
    for doc, item in zip(docs, items, strict=True):
        assert (doc["id"], doc["kind"], doc["answer"]) == (item["id"], item["kind"], item["answer"])
        assert item["question"] == ("<image>\n" if images else "") + doc["question"]
        sizes = [picture.size for picture in pictures(doc)]
        assert sizes == ([(16, 16)] if images else [])
    task = yaml.load((tmp_path / "task" / f"{name}.yaml").read_text(), Loader)
    assert task["task"] == name
    assert task["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "task" / f"{name}.jsonl")}
    assert task["generation_kwargs"]["max_new_tokens" if images else "max_gen_toks"] == 4
    assert task.get("doc_to_visual") == ("ders.harness.tasks.pictures" if images else None)
    with pytest.raises(ModelFolderError, match="exists"):
        write_task(tmp_path / "task", "digits", source, prepared)


def test_what_is_scored_by_likelihood_is_refused(tmp_path: Path) -> None:
    source = DigitsVQA(num_train=1, num_val=1, num_test=1, images=False, scored_by="likelihood")
    with pytest.raises(ValueError, match="scored by likelihood"):
        write_task(tmp_path / "task", "digits", source, source.prepare(tmp_path))


def test_questions_without_a_picture_stand_beside_those_with_one(tmp_path: Path) -> None:
    source = DigitsVQA(num_train=1, num_val=1, num_test=1)
    folder = source.prepare(tmp_path).paths("test")[0].parent
    rows = json.loads((folder / "test.json").read_text())
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This"}]
    (tmp_path / "mixed.json").write_text(json.dumps([*rows, {"id": "text", "conversations": turns}]))
    mixed = LlavaFiles(train=str(tmp_path / "mixed.json"), images=str(folder / "images"))
    about = write_task(tmp_path / "task", "mixed", mixed, mixed.prepare(tmp_path), "train")
    assert about["harness"] == "lmms-eval"
    last = json.loads((tmp_path / "task" / "ders_mixed_train.jsonl").read_text().splitlines()[-1])
    assert pictures(last) == pictures({**last, "image": None}) == []
