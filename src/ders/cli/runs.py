"""A run's folder before the run: whose it is, what continues in it, what moves aside."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ders.cli.app import ROOT, UserError
from ders.reporting import read_record
from ders.reporting.identity import differences, identity, without_trainer
from ders.training.checkpoints import CheckpointError, Saved, find

log = logging.getLogger(__name__)


def checkpoint_of(config: DictConfig, plain: dict[str, Any], folder: Path) -> Saved | None:
    """The checkpoint to continue from, checked to be this configuration's, on whatever processes."""
    if config.ckpt_path is None:
        return None
    try:
        saved = find(config.ckpt_path, folder / "checkpoints")
    except CheckpointError as error:
        raise UserError(str(error)) from error
    if saved is None:
        return None
    differing = differences(without_trainer(saved.identity), without_trainer(identity(plain)))
    if differing:
        raise UserError(
            f"ckpt_path={saved.folder} belongs to another configuration (there → here):\n  "
            + "\n  ".join(differing[:10])
            + "\nUse the same dials, or start without ckpt_path"
        )
    return saved


def prepare_folder(folder: Path, plain: dict[str, Any], *, resume: bool) -> None:
    """An earlier attempt's files move aside when this one starts from the beginning: nothing is lost by a slip."""
    if not resume and folder.exists() and any(folder.iterdir()):
        attempts = folder / "previous"
        attempts.mkdir(exist_ok=True)
        previous = attempts / str(len(list(attempts.iterdir())))
        entries = [entry for entry in folder.iterdir() if entry != attempts]
        previous.mkdir()
        for entry in entries:
            entry.rename(previous / entry.name)
        log.warning("starting over: what was here is now in %s. ckpt_path=last would have continued it", previous)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process group per run folder: a second one of the same configuration is refused."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder} is being written by another process with the same configuration") from None
    try:
        yield
    finally:
        lock.release()


def finished(folder: Path) -> bool:
    file = folder / "record.json"
    return file.exists() and read_record(file)["status"] == "finished"


def command_of(plain: dict[str, Any]) -> list[str]:
    """What repeats this very job, also one of a sweep, or the vanilla run behind a compression."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else sys.argv[1:]
    return ["python", "train.py", *(o for o in overrides if _belongs_to(o, plain))]


def _belongs_to(override: str, plain: dict[str, Any]) -> bool:
    """Whether an override of the sweep's job is one of this very configuration, which may be the job's vanilla run."""
    head, *path = re.split(r"[.@]", override.lstrip("+~").split("=", 1)[0])
    if head in ("compression", "experiments", "hparams_search"):
        return head in plain
    if head not in plain:  # a choice of files alone, as recipe=…
        return (ROOT / "conf" / head).is_dir()
    value = plain[head]
    return bool(path) or isinstance(value, dict | list) or yaml.safe_load(override.split("=", 1)[1]) == value
