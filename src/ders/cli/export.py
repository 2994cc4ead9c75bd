"""`python scripts/export.py`: a trained MoE's folder in a layout that others load, checked before it appears."""

import json
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from ders.cli.app import check_format, launch
from ders.cli.folders import model_folder
from ders.cli.progress import byte_progress
from ders.models.exporting import export


def main() -> None:
    launch(run, "export")


def run(config: DictConfig) -> None:
    """Export one folder and say how near it came."""
    check_format(config.format)
    output = Path(config.output)
    with byte_progress("exporting") as progress:
        report = export(
            model_folder(config.checkpoint), output, layout=config.layout, overwrite=config.overwrite, progress=progress
        )
    if config.format == "json":
        print(json.dumps({"output": str(output), **asdict(report)}))
    else:
        print(f"{output}: {report}")
