"""What a folder given on the command line means."""

from pathlib import Path
from typing import Any

from ders.checkpoint import TensorFolder
from ders.cli.app import UserError


def model_folder(given: str | Path) -> Path:
    """The model folder itself, or the one inside a run's folder."""
    folder = Path(given)
    inner = folder / "model"
    return inner if (inner / "config.json").is_file() and not (folder / "config.json").is_file() else folder


def provenance_of(config: dict[str, Any]) -> dict[str, Any]:
    """What a folder's configuration says of where the model came from; empty where it says nothing."""
    return (config.get("quantization_config") or {}).get("provenance") or {}


def resolve_base(base: str, checkpoint: Path) -> Path | str:
    """What `base` names: the folder of the parent that the checkpoint records, the mean, or a given folder.

    Raises:
        UserError: the parent is not recorded, or not where it was.
    """
    if base == "mean":
        return base
    if base != "parent":
        return Path(base)
    # The configuration alone: reading the source would hash its weights, which the compression does anyway.
    parent = provenance_of(TensorFolder(checkpoint).config()).get("parent")
    if parent is None:
        raise UserError(
            f"{checkpoint} does not record the dense model it came from: give its folder, base=DIR, or base=mean"
        )
    if not Path(parent).is_dir():
        raise UserError(
            f"{checkpoint} came from {parent}, which is not there any more: give that model's folder, base=DIR, or "
            "base=mean"
        )
    return Path(parent)
