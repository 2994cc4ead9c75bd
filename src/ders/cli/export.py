"""`python scripts/export.py`: a trained MoE's folder in a layout that others load, checked before it appears."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from ders.cli.app import launch
from ders.cli.progress import byte_progress
from ders.models.exporting import export


def main() -> None:
    launch(run, "export")


def run(config: DictConfig) -> None:
    """Export one folder and say how near it came."""
    logging.captureWarnings(True)
    output = Path(config.output)
    with byte_progress("exporting") as progress:
        report = export(
            Path(config.checkpoint), output, layout=config.layout, overwrite=config.overwrite, progress=progress
        )
    if config.format == "json":
        print(json.dumps({"output": str(output), **asdict(report)}))
    else:
        print(f"{output}: {report}")
