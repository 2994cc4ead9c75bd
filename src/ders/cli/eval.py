"""`python scripts/eval.py`: scores of a model folder on the data it was trained on, or on any other, or on code."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ders.checkpoint import read_config_json
from ders.cli.app import ROOT, UserError, check_format, composed, launch
from ders.cli.code import score_programs
from ders.cli.folders import model_folder, provenance_of
from ders.cli.instantiation import instantiate
from ders.data import DataSource
from ders.data.metrics import scorer_of
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
    if config.get("evaluation"):
        score_programs(config, checkpoint, _DTYPES[config.dtype])
        return
    for dial in ("samples", "record"):
        if config[dial] is not None:
            raise UserError(f"{dial}=… is of a code evaluation: add evaluation=humaneval, or drop it")
    provenance = provenance_of(read_config_json(checkpoint))
    name, source = _source(config, provenance, checkpoint)
    prepared = source.prepare(ROOT / config.output_dir / "cache")
    if config.split not in prepared.files:
        raise UserError(f"data={name} has no {config.split} split. It has {', '.join(sorted(prepared.files))}")
    trained_on = provenance.get("data_hash")
    if trained_on not in (None, prepared.data_hash):
        log.warning(
            "this is not the very data that %s was trained on: its hash was %.10s, that of data=%s is %.10s. "
            "data=… and its dials choose another",
            checkpoint,
            trained_on,
            name,
            prepared.data_hash,
        )
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
    title = f"{checkpoint} on {name} ({config.split}), {stored / 1e6:,.2f} MB"
    Console().print(_table(title, metrics, config.split, source.scorers))


def _table(title: str, metrics: dict[str, Any], split: str, scorers: Mapping[str, str]) -> Table:
    """One line for all questions and one for each kind; the data's own scores only where it names scorers."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    own = f"{split}/score" in metrics
    told = f"{split}/loss" in metrics
    headings = ["accuracy %", *(["own score %"] if own else []), "question-only prior %", "questions"]
    if told:
        headings = ["loss", "perplexity", "tokens foretold %", "prior %", "tokens"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for label, key in _rows(metrics, split):
        accuracy, prior = metrics[f"{split}/accuracy{key}"], metrics[f"{split}/prior{key}"]
        cells = [_percent(accuracy), _percent(prior), str(accuracy["count"])]
        if told:
            cells = [f"{metrics[f'{split}/{metric}{key}']['value']:.4f}" for metric in ("loss", "perplexity")] + cells
        if own:
            scorer = scorer_of(label, scorers) if key else "score"
            cells.insert(1, "" if scorer is None else f"{scorer} {_percent(metrics[f'{split}/{scorer}{key}'])}")
        table.add_row(label, *cells)
    return table


def _percent(metric: dict[str, Any]) -> str:
    return f"{100 * metric['value']:.1f}"


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
