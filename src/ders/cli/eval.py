"""`python scripts/eval.py`: scores of a model folder on the data it was trained on, or on any other."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ders.checkpoint import read_config_json
from ders.cli.app import ROOT, UserError, check_format, composed, launch
from ders.cli.folders import model_folder, provenance_of
from ders.cli.instantiation import instantiate
from ders.data import DataSource
from ders.evaluation.scoring import score
from ders.models.bundle import load_bundle, stored_bytes

log = logging.getLogger(__name__)

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    launch(run, "eval")


def run(config: DictConfig) -> None:
    """Score one folder."""
    check_format(config.format)
    checkpoint = model_folder(config.checkpoint)
    if config.dtype not in _DTYPES:
        raise UserError(f"dtype must be one of {', '.join(_DTYPES)}: got {config.dtype!r}")
    if config.split not in ("test", "val"):
        raise UserError(f"split must be test or val: got {config.split!r}")
    provenance = provenance_of(read_config_json(checkpoint))
    name, source = _source(config, provenance, checkpoint)
    prepared = source.prepare(ROOT / config.output_dir / "cache")
    if config.split not in prepared.files:
        raise UserError(f"data={name} has no {config.split} split. It has {', '.join(sorted(prepared.files))}")
    if provenance.get("data_hash") not in (None, prepared.data_hash):
        log.warning("this is not the very data that %s was trained on: its hash differs", checkpoint)
    bundle = load_bundle(checkpoint, dtype=_DTYPES[config.dtype])
    bundle.model.to(config.device)
    metrics = score(bundle, source, prepared, config.split, config.split).metrics
    stored = stored_bytes(checkpoint)
    if config.format == "json":
        flat = {key: metric["value"] for key, metric in metrics.items()}
        count = metrics[f"{config.split}/accuracy"]["count"]
        about = {"checkpoint": str(checkpoint), "data": name, "split": config.split, "stored_bytes": stored}
        print(json.dumps({**about, "count": count, **flat}))
        return
    table = Table(title=f"{checkpoint} on {name} ({config.split}), {stored / 1e6:,.2f} MB", title_justify="left")
    table.add_column("")
    for heading in ("accuracy %", "question-only prior %", "questions"):
        table.add_column(heading, justify="right")
    for label, key in _rows(metrics, config.split):
        accuracy, prior = metrics[f"{config.split}/accuracy{key}"], metrics[f"{config.split}/prior{key}"]
        table.add_row(label, f"{100 * accuracy['value']:.1f}", f"{100 * prior['value']:.1f}", str(accuracy["count"]))
    Console().print(table)


def _rows(metrics: dict[str, Any], split: str) -> list[tuple[str, str]]:
    start = f"{split}/accuracy/"
    kinds = sorted(key.removeprefix(start) for key in metrics if key.startswith(start))
    return [("all", ""), *((kind, f"/{kind}") for kind in kinds)]


def _source(config: DictConfig, provenance: dict[str, Any], checkpoint: Path) -> tuple[str, DataSource]:
    """The data's name and source. A folder names its data; what that name means stands in our own `conf/`."""
    if config.get("data"):
        return HydraConfig.get().runtime.choices["data"], instantiate(config.data)
    name = provenance.get("data")
    known = sorted(file.stem for file in (ROOT / "conf" / "data").glob("*.yaml"))
    if name not in known:
        raise UserError(
            f"{checkpoint} does not say which data it was trained on: choose data={' or data='.join(known)}"
            if name is None
            else f"{checkpoint} was trained on {name!r}, which is not known here: choose one of {', '.join(known)}"
        )
    scale = provenance.get("scale") or "tiny"
    return name, instantiate(composed("eval", [f"checkpoint='{checkpoint}'", f"data={name}", f"scale={scale}"]).data)
