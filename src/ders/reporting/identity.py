"""What makes two runs the same run."""

import hashlib
import json
from pathlib import Path
from typing import Any

# What says where, how long and how fast, not what: changing it must find the same folder again.
_NOT_IDENTITY = (
    "ckpt_path",
    "skip_completed",
    "keep_checkpoints",
    "output_dir",
    "logger",
    "experiments",
    "hparams_search",
    "execution",
)
_TRAINER_LIMITS = ("max_steps", "max_time", "log_every_n_steps")
# Dials that came after the first records, at the values that change nothing: with them a run is the run it was before.
_WITHOUT_EFFECT = {"export": "last", "skip_spikes": None, "parent_precision": "32-true"}


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that decides a run's result."""
    kept = {
        key: value
        for key, value in config.items()
        if key not in _NOT_IDENTITY and (key, value) not in _WITHOUT_EFFECT.items()
    }
    trainer = {k: v for k, v in config.get("trainer", {}).items() if k not in _TRAINER_LIMITS}
    return {**kept, "trainer": trainer}


def without_trainer(identity: dict[str, Any]) -> dict[str, Any]:
    """What must be the same to continue a run's training, be it on other processes."""
    return {key: value for key, value in identity.items() if key != "trainer"}


def digest(data: Any) -> str:
    """Ten hexadecimal digits that name plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:10]


def run_folder(config: dict[str, Any], root: Path) -> Path:
    """`outputs/<method>-<hash>` of a resolved configuration."""
    return root / config["output_dir"] / f"{config['method']['name']}-{digest(identity(config))}"


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two plain configurations differ, as `key: a → b`."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b})
        return [d for key in keys for d in differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)]
    return [] if a == b else [f"{path}: {a} → {b}"]
