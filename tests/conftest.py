"""What all tests share: the repository, small runs of the real command, dense models of every family."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

ROOT = Path(__file__).resolve().parents[1]

# The true configuration, shrunk: two steps a stage, few images.
SMALL = [
    "stage.tower.max_steps=2",
    "stage.projector.max_steps=2",
    "stage.finetune.max_steps=2",
    "stage.moe.max_steps=4",
    "stage.moe.global_batch_size=8",
    "stage.moe.validate_every=2",
    "stage.moe.save_every=2",
]
SMALL_DATA = ["data.num_train=64", "data.num_val=8", "data.num_test=8"]


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output folder for the whole session: one tiny parent serves all runs that are alike."""
    return tmp_path_factory.mktemp("output_dir")


@pytest.fixture
def run_job(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """One job in this process: overrides in, run folder out."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from ders.cli.app import prepare_hydra, to_plain
    from ders.cli.train import run
    from ders.reporting.identity import run_folder

    monkeypatch.setattr(sys, "argv", ["train.py"])
    prepare_hydra()

    def job(*overrides: str, data: list[str] = SMALL_DATA) -> Path:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train", overrides=[*SMALL, *data, f"output_dir={outputs}", *overrides])
        run(config)
        return run_folder(to_plain(config), ROOT)

    return job


@pytest.fixture
def command(outputs: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A real command in its own process, from another working folder."""

    def start(
        *arguments: str, root: Path = ROOT, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=outputs,
            env={**os.environ, "PYTHONPATH": str(root / "src"), **(env or {})},
            capture_output=True,
            text=True,
            timeout=500,
            **options,
        )

    return start


@pytest.fixture
def train(command: Any, outputs: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python train.py` in smoke form."""

    def start(*overrides: str, root: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
        flags = [o for o in overrides if o.startswith("-")]
        dials = [*SMALL, *SMALL_DATA, f"output_dir={outputs}", *(o for o in overrides if not o.startswith("-"))]
        return command(str(root / "train.py"), *flags, *dials, root=root, **options)

    return start


SHAPES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@functools.cache
def _dense(model_type: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    extra = {"head_dim": 8} if "gemma" in model_type or model_type == "glm" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPES, **extra))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # born zero: a bias that is lost must show
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def dense_model() -> Callable[..., Any]:
    """A fresh small dense model of a family."""
    import copy

    return lambda model_type="llama": copy.deepcopy(_dense(model_type))


@pytest.fixture
def llava_model() -> Any:
    from ders.models.tiny import TinyLlava

    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    text = {k: v for k, v in SHAPES.items() if k != "vocab_size" and not k.endswith("token_id")}
    recipe = TinyLlava(
        text={"model_type": "llama", **text}, vision={**vision, "num_attention_heads": 2}, feature_layer=-1
    )
    return recipe.build(["USER: what is it? ASSISTANT: 7"])


def language_module(bundle: Any) -> Any:
    """A module that trains a model, without a trainer."""
    from ders.training import schedule
    from ders.training.modules import LanguageModule

    shared: dict[str, Any] = {"optimizer": torch.optim.AdamW, "schedule": schedule}
    shared |= {"num_steps": 1, "seed": 0, "identity": {}}
    return LanguageModule(bundle, router_loss_coef=0.0, max_answer_tokens=2, **shared)


@functools.cache
def why_no_sandbox() -> str:
    """Why programs cannot be contained on this machine; empty where they can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed: apt-get install bubblewrap"
    bare = ["bwrap", "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "true"]
    tried = subprocess.run(bare, capture_output=True, text=True)
    return f"user namespaces are forbidden here: {tried.stderr.strip()}" if tried.returncode else ""


@pytest.fixture(scope="session")
def sandbox() -> Any:
    """The real sandbox at a short time limit; skips where there cannot be one, and nowhere else."""
    from ders.evaluation.sandbox import Sandbox

    if why := why_no_sandbox():
        pytest.skip(why)
    return Sandbox(1.0)
