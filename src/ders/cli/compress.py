"""`python scripts/compress.py`: a trained MoE's folder becomes one of a shared base and small deltas."""

import json
import logging
import time
from pathlib import Path

from omegaconf import DictConfig

from ders.checkpoint import TensorFolder
from ders.cli.app import UserError, launch
from ders.cli.instantiation import instantiate
from ders.cli.progress import byte_progress
from ders.compression import compress_folder, read_source

log = logging.getLogger(__name__)


def main() -> None:
    launch(run, "compress")


def run(config: DictConfig) -> None:
    """Compress one folder and say what came of it."""
    checkpoint, output = Path(config.checkpoint), Path(config.output)
    delta = instantiate(config.compression)["delta"]
    base = resolve_base(config.base, checkpoint)
    started = time.perf_counter()
    with byte_progress("compressing") as progress:
        summary = compress_folder(
            checkpoint,
            output,
            base=base,
            delta=delta,
            extended=config.extended,
            overwrite=config.overwrite,
            progress=progress,
            provenance={"compression": config.compression.name},
        )
    before, after = TensorFolder(checkpoint).num_bytes, TensorFolder(output).num_bytes
    result = {
        "output": str(output),
        "compression": config.compression.name,
        "base": str(base),
        "expert_bytes": summary.expert_bytes,
        "base_bytes": summary.base_bytes,
        "delta_bytes": summary.delta_bytes,
        "ratio": summary.ratio,
        "relative_delta": summary.relative_delta,
        "stored_bytes_before": before,
        "stored_bytes": after,
        "wall_seconds": round(time.perf_counter() - started, 2),
    }
    if config.format == "json":
        print(json.dumps(result))
    else:
        print(f"{summary}\n{output}: {before / 1e6:,.2f} MB → {after / 1e6:,.2f} MB")


def resolve_base(base: str, checkpoint: Path) -> Path | str:
    """What `base` names: the folder of the parent that the checkpoint records, the mean, or a given folder.

    Raises:
        UserError: the parent is not recorded, or not where it was.
    """
    if base == "mean":
        return base
    if base != "parent":
        return Path(base)
    parent = read_source(checkpoint).provenance.get("parent")
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
