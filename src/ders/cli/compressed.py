"""A compression row of a table: a vanilla run, trained once and cached, then compressed and scored."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf, open_dict

from ders.accounting import count_parameters
from ders.cli.app import ROOT
from ders.cli.dials import dials_of
from ders.cli.folders import resolve_base
from ders.cli.instantiation import instantiate
from ders.compression import compress_folder
from ders.data import DataSource, PreparedData
from ders.evaluation.scoring import score
from ders.models.bundle import load_bundle, stored_bytes
from ders.reporting import read_record
from ders.training.callbacks import peak_gib, reset_peak
from ders.training.processes import is_first_process


def without_compression(config: DictConfig) -> DictConfig:
    """The configuration of the vanilla run behind a compression row."""
    conf = ROOT / "conf"
    added = {"compression", *dials_of(conf / "compression" / f"{config.compression.name}.yaml", conf)}
    # Where the universal FFN could be extended in training too, the dial stays, and what is compressed was not.
    shared = {"extended": False} if "extended" in config.upcycling else {}
    vanilla = OmegaConf.create(
        {key: value for key, value in OmegaConf.to_container(config).items() if key not in added} | shared
    )
    OmegaConf.set_struct(vanilla, True)
    with open_dict(vanilla):
        vanilla.ckpt_path = None
    return vanilla


@contextlib.contextmanager
def waiting_for(folder: Path) -> Iterator[None]:
    """Several rows may need one vanilla run: one process makes it, the others wait."""
    if not is_first_process():
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.first.lock")):
        yield


def compress_and_score(config: DictConfig, trained: Path, folder: Path, results: dict[str, Any]) -> None:
    """Compress a finished vanilla run's model into `folder` and score what was written."""
    started = time.perf_counter()
    reset_peak()
    source: DataSource = instantiate(config.data)
    prepared = source.prepare(ROOT / config.output_dir / "cache")
    results["data_hash"] = prepared.data_hash
    vanilla = read_record(trained / "record.json")
    summary = compress_folder(
        trained / "model",
        folder / "model",
        base=resolve_base(config.base, trained / "model"),
        delta=instantiate(config.compression)["delta"],
        extended=config.extended,
        provenance={"compression": config.compression.name},
    )
    results["expert_bytes"] = summary.base_bytes + summary.delta_bytes
    results["stored_bytes"] = stored_bytes(folder / "model")
    results.update(vars(count_parameters(load_bundle(folder / "model").model)))
    results["trainable_params"] = vanilla["trainable_params"]  # nothing is trained here: what the vanilla run did
    device = torch.device("cuda" if config.trainer.accelerator == "gpu" else "cpu")
    before = {
        key.replace("test/", "vanilla/"): value
        for key, value in vanilla["metrics"].items()
        if key.startswith(("test/accuracy", "test/loss"))
    }
    parents = {key: value for key, value in vanilla["metrics"].items() if key.startswith("parent/")}
    results["metrics"] = score_folder(folder, source, prepared, device) | before | parents
    results["peak_gib"] = peak_gib()
    results["wall_seconds"] = round(time.perf_counter() - started, 2)


def score_folder(folder: Path, source: DataSource, prepared: PreparedData, device: torch.device) -> dict[str, Any]:
    """Test scores of the model folder that was written, not of one in memory: what is counted is what users load."""
    if "test" not in prepared.files:
        return {}
    exported = load_bundle(folder / "model")
    exported.model.to(device)
    scored = score(exported, source, prepared, "test", "test")
    with (folder / "predictions.jsonl").open("w") as file:
        file.writelines(json.dumps(item) + "\n" for item in scored.predictions)
    return scored.metrics
