"""Runs in `.venv-lmms-eval`: what the plug-in gives the model and makes of its answers, and what the benchmarks ask."""

import json
import sys
from pathlib import Path

import lmms_eval
from lmms_eval import models, utils
from lmms_eval.api.instance import Instance

from ders.harness.lmms_eval import DersLMM, _greedy
from ders.harness.tasks import pictures

given = json.loads(Path(sys.argv[1]).read_text())
docs = given["docs"]
lmm = DersLMM(given["folder"], batch_size=2)
lmm.task_dict = {"task": {"test": docs}}


def requests(kind: str, second: list) -> list[Instance]:
    about = [{"task": "task", "doc_id": number, "repeats": 1} for number in range(len(docs))]
    arguments = [
        (doc["question"], thing, pictures, number, "task", "test")
        for number, (doc, thing) in enumerate(zip(docs, second, strict=True))
    ]
    return [Instance(kind, args, 0, metadata=one) for args, one in zip(arguments, about, strict=True)]


def refusal(options: dict) -> str:
    try:
        _greedy(options)
    except ValueError as error:
        return str(error)
    return ""


tasks = Path(lmms_eval.__file__).parent / "tasks"
told = {
    "model": models.get_model("ders").__name__,
    "ids": [lmm._question(r.args[0], *r.args[2:])["ids"] for r in requests("generate_until", docs)],
    "answers": lmm.generate_until(requests("generate_until", [{"max_new_tokens": n} for n in given["lengths"]])),
    "loglikelihood": lmm.loglikelihood(requests("loglikelihood", [f" {doc['answer']}" for doc in docs])),
    "of_the_doc": lmm.loglikelihood(requests("loglikelihood", [lambda doc: doc["answer"]] * len(docs))),
    "benchmarks": {
        name: _greedy(utils.load_yaml_config(str(tasks / name))["generation_kwargs"]) for name in given["benchmarks"]
    },
    "refusals": [refusal(options) for options in given["sampled"]],
}
Path(sys.argv[2]).write_text(json.dumps(told))
