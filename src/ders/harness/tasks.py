"""Prepared data as a task of a harness: a YAML and the questions as JSON lines."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ders.checkpoint import new_folder
from ders.data import DataSource, PreparedData
from ders.data.images import open_image, resolve_image
from ders.data.loading import single_questions
from ders.data.rows import IMAGE_TAG


def write_task(
    folder: Path, name: str, source: DataSource, prepared: PreparedData, split: str = "test"
) -> dict[str, Any]:
    """Write a split as a task: for lmms-eval where questions have images, else for lm-eval.

    Every turn of a row is a question of its own, as in our evaluation. The harness scores by its own exact match, which
    ignores letter case alone; ours also ignores blanks around signs and a final full stop.

    Args:
        folder: where `<task>.yaml` and `<task>.jsonl` go, the harness' `--include_path`; must not exist.
        name: of the data; the task is `ders_<name>_<split>`.

    Returns:
        `harness` (lm-eval or lmms-eval), `task` and `num_questions`.

    Raises:
        DataError: there is no such split, or rows of it cannot be used.
        ModelFolderError: the folder exists.
        ValueError: the data is scored by likelihood.
    """
    if source.scored_by != "answers":
        raise ValueError("only data with answers to match becomes a task: this one is scored by likelihood")
    task = f"ders_{name}_{split}"
    docs = [_doc(item, prepared.image_root) for row in prepared.split(split) for item in single_questions(row)]
    pictured = any("image" in doc for doc in docs)
    with new_folder(folder) as unfinished:
        (unfinished / f"{task}.jsonl").write_text("".join(f"{json.dumps(doc)}\n" for doc in docs))
        file = folder.resolve() / f"{task}.jsonl"
        config = _config(task, split, file, source.max_answer_tokens, pictured=pictured)
        # JSON is YAML.
        lines = [f"{key}: {json.dumps(value)}" for key, value in config.items()]
        if pictured:
            lines.append(f"doc_to_visual: !function {__name__}.pictures")
        (unfinished / f"{task}.yaml").write_text("\n".join(lines) + "\n")
    return {"harness": "lmms-eval" if pictured else "lm-eval", "task": task, "num_questions": len(docs)}


def pictures(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture of a question; none where it has none."""
    return [open_image(Path(doc["image"]))] if doc.get("image") else []


def _doc(item: dict[str, Any], image_root: Path | None) -> dict[str, Any]:
    # The harness' own benchmarks name no image in their text: the plug-in puts the tag where training had it.
    question = item["question"].removeprefix(f"{IMAGE_TAG}\n")
    doc = {"id": item["id"], "kind": item["kind"], "question": question, "answer": item["answer"]}
    if item["image"] is not None:
        assert image_root is not None
        doc["image"] = str(resolve_image(item["image"], image_root))
    return doc


def _config(task: str, split: str, file: Path, max_answer_tokens: int, *, pictured: bool) -> dict[str, Any]:
    limit = "max_new_tokens" if pictured else "max_gen_toks"
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(file)}},
        "test_split": split,
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {limit: max_answer_tokens, "do_sample": False, "until": []},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
        ],
        "metadata": {"version": 1},
    }
