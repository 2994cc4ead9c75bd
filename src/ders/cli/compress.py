"""`python scripts/compress.py`: a trained MoE's folder becomes one of a shared base and small deltas."""

import json
import logging
import time
from pathlib import Path

from omegaconf import DictConfig

from ders.checkpoint import TensorFolder
from ders.cli.app import check_format, launch
from ders.cli.folders import model_folder, resolve_base
from ders.cli.instantiation import instantiate
from ders.cli.progress import byte_progress
from ders.compression import compress_folder

log = logging.getLogger(__name__)


def main() -> None:
    launch(run, "compress")


def run(config: DictConfig) -> None:
    """Compress one folder and say what came of it."""
    check_format(config.format)
    checkpoint, output = model_folder(config.checkpoint), Path(config.output)
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
