"""Runs in `.venv-lm-eval`: what the plug-in gives the model, and what it makes of its answers."""

import json
import sys
from pathlib import Path

from lm_eval.api.instance import Instance

from ders.harness.lm_eval import DersLM

given = json.loads(Path(sys.argv[1]).read_text())
told = {}
for prompt in given["prompts"]:
    lm = DersLM(given["folder"], prompt=prompt, device="cpu", batch_size=2)
    ids, mask = lm.tok_batch_encode(given["questions"])
    pairs = [Instance("loglikelihood", {}, pair, 0) for pair in zip(given["questions"], given["answers"], strict=True)]
    whole = [Instance("loglikelihood_rolling", {}, (question,), 0) for question in given["questions"]]
    told[str(prompt)] = {
        "ids": [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)],
        "loglikelihood": lm.loglikelihood(pairs, disable_tqdm=True),
        "rolling": lm.loglikelihood_rolling(whole, disable_tqdm=True),
    }
Path(sys.argv[2]).write_text(json.dumps(told))
