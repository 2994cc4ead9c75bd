"""Processes in the environments of the harnesses, and a model whose tokens depend on how text is cut."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SHAPES

from ders.models.bundle import ModelBundle


@pytest.fixture
def harness(tmp_path: Path) -> Callable[..., str]:
    """A command in an environment: its name and arguments in, standard output out."""

    def run(name: str, *arguments: str, cwd: Path = tmp_path) -> str:
        python = ROOT / f".venv-{name}" / "bin" / "python"
        if not python.exists():
            pytest.skip(f"no environment of {name} here: `make {name}` builds it")
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run([python, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture
def probe(harness: Callable[..., str], tmp_path: Path) -> Callable[..., Any]:
    """A probe beside these tests, in an environment: plain data in, plain data out."""

    def ask(name: str, given: dict[str, Any]) -> Any:
        (tmp_path / "given.json").write_text(json.dumps(given))
        script = Path(__file__).with_name(f"probe_{name.replace('-', '_')}.py")
        harness(name, str(script), str(tmp_path / "given.json"), str(tmp_path / "told.json"))
        return json.loads((tmp_path / "told.json").read_text())

    return ask


@pytest.fixture
def subwords() -> ModelBundle:
    """A text model whose tokenizer joins a word with the blank before it: pieces and whole differ."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["USER: what is it? ASSISTANT: this one is it"] * 8, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token=None
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPES | {"vocab_size": len(fast), "max_position_embeddings": 512})
    return ModelBundle(AutoModelForCausalLM.from_config(config), fast)
