"""Whether training on several processes is training on one, and whether it takes the memory that was planned."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ders.accounting.memory import TrainedParams, model_state_bytes
from ders.evaluation.memory import EXACT
from ders.evaluation.worker import METHODS, Job
from ders.models.bundle import save_bundle
from ders.models.tiny import TinyLlava, TinyLM
from ders.training.checkpoints import steps_in

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
STEPS = 8
_PLAIN, CONTINUED = "one step, one batch", "continued"
CASES: dict[str, dict[str, Any]] = {
    _PLAIN: {},
    "two micro-batches a step": {"accumulate": 2},
    "two micro-batches, plain descent": {"accumulate": 2, "optimizer": "sgd"},
    "activation checkpointing": {"gradient_checkpointing": True},
    "a text model": {"images": False},
    "more experts than tokens": {"num_experts": 64, "top_k": 1, "rows": 4},
}
# Relative: single precision sums in another order, and AdamW divides by the roots of small squares.
MAX_LOSS_DIFFERENCE, MAX_WEIGHT_DIFFERENCE = 1e-5, 1e-4
MAX_MEMORY_DIFFERENCE = 0.10

_TINY = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
_SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def equivalence_suite(
    work: Path,
    methods: Sequence[str] = tuple(METHODS),
    strategies: Sequence[str] = STRATEGIES,
    cases: Sequence[str] = (*CASES, CONTINUED),
) -> dict[str, Any]:
    """Losses and weights of every method and strategy beside one process, and of continued runs beside whole ones.

    Every second row has a picture, so that some processes have none in some steps.

    Returns:
        `rows`: one per case, with the largest relative difference of a loss and the relative Frobenius difference of
        the weights; `goals`; `seconds`. What it made in `work` is removed.
    """
    started = time.perf_counter()
    _fresh(work)
    groups = _groups(_parents(work), work, methods, strategies, cases)
    try:
        for devices in (1, 2):
            run_jobs([job for group in groups for job in group if job.devices == devices], devices, work)
        rows = [_compared(group) for group in groups if len(group) > 1]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    goals = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case and row["strategy"] != "single"]
        for key, limit in (("loss", MAX_LOSS_DIFFERENCE), ("weights", MAX_WEIGHT_DIFFERENCE)):
            goals.append(_goal(f"{case}: largest difference, {key}", max(r[f"{key}_difference"] for r in mine), limit))
    if alone := [row["weights_difference"] for row in rows if row["strategy"] == "single"]:
        goals.append(_goal("continued on one process: largest difference, weights", max(alone), 0.0))
    return {"rows": rows, "goals": goals, "seconds": time.perf_counter() - started}


def _groups(
    parents: dict[bool, Path], work: Path, methods: Sequence[str], strategies: Sequence[str], cases: Sequence[str]
) -> list[list[Job]]:
    """Groups of jobs: those before the last produce what the last is compared with, or goes on from.

    Args:
        parents: a model with, and one without a vision tower.
    """

    def job(case: str, method: str, strategy: str) -> Job:
        options = CASES.get(case, {})
        parent = parents[options.get("images", True)]
        folder = str(work / case.replace(" ", "_") / strategy / method)
        devices = 1 if strategy == "single" else 2
        return Job(method, strategy, str(parent), folder, STEPS, devices=devices, **options)

    groups = []
    for case, options in CASES.items():
        if case not in cases:
            continue
        for method in methods if not options else [m for m in methods if m in ("vanilla", "ders_sm")]:
            alone = job(case, method, "single")
            groups += [[alone], *([alone, job(case, method, strategy)] for strategy in strategies)]
    for strategy in ("single", *strategies) if CONTINUED in cases else ():
        for method in methods:
            first = replace(job(CONTINUED, method, strategy), stop_after=STEPS // 2)
            groups.append([job(_PLAIN, method, strategy), first, replace(first, stop_after=None, resume=True)])
    return groups


def run_jobs(jobs: Iterable[Job], devices: int, work: Path, seconds: float = 1800) -> None:
    """Run jobs, each once, in one group of processes.

    Raises:
        RuntimeError: one failed, or they took too long.
    """
    file, port = work / f"jobs_{devices}.json", _free_port()
    file.write_text(json.dumps([asdict(job) for job in dict.fromkeys(jobs)]))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(devices), "--master-port", str(port)]
    command = [sys.executable, *(launcher if devices > 1 else ()), "-m", "ders.evaluation.worker", str(file)]
    environment = {**os.environ, **EXACT, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "Error" in line]
        raise RuntimeError("\n".join([f"a job on {devices} processes failed:", *told[:10]]))


def _compared(group: Sequence[Job]) -> dict[str, Any]:
    ours, other = Path(group[-1].folder), Path(group[0].folder)
    pairs = zip(losses(ours), losses(other), strict=True)
    return {
        "case": ours.parent.parent.name.replace("_", " "),
        "method": group[-1].method,
        "strategy": group[-1].strategy,
        "loss_difference": max(abs(a - b) / abs(b) for a, b in pairs),
        "weights_difference": weights_difference(ours, other),
        "last_loss": losses(ours)[-1],
    }


def losses(folder: Path) -> list[float]:
    """The training losses of a run, step by step."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")}
    return [float(rows[step]) for step in sorted(rows)]


def weights_difference(ours: Path, other: Path) -> float:
    """Relative Frobenius difference of the models in two runs' last checkpoints, over all their weights together."""
    a, b = (_weights(folder) for folder in (ours, other))
    if a.keys() != b.keys():
        raise RuntimeError(f"{ours} and {other} hold other tensors: {sorted(a.keys() ^ b.keys())[:3]}")
    distance = sum(float((a[name] - b[name]).square().sum()) for name in b)
    return (distance / sum(float(tensor.square().sum()) for tensor in b.values())) ** 0.5


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    last = list(steps_in(folder / "checkpoints").values())[-1] / "model"
    tensors = {name: t for file in last.glob("*.safetensors") for name, t in load_file(file).items()}
    return {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}


def zero_memory_suite(work: Path) -> dict[str, Any]:
    """Bytes of weights, gradients and optimizer states on one of two processes beside the plan's, for ZeRO 1 to 3.

    SmolLM2-135M's shapes with random weights, in bf16 with fp32 masters. Measured is how far a process' resident memory
    rises in its second step above what it held before there was a model: buckets, and the little that a batch of
    sixteen tokens takes, are in that, and not in the plan.
    """
    started = time.perf_counter()
    _fresh(work)
    torch.manual_seed(0)
    recipe = TinyLM(text={"model_type": "llama", "max_position_embeddings": 64, **_SMOLLM2_135M})
    parent, small = work / "parent", tiny_llava(work / "small")
    save_bundle(recipe.build(["a few words"]), parent)
    jobs = [
        Job(
            method,
            strategy,
            str(parent),
            str(work / strategy / method),
            3,
            devices=2,
            precision="bf16-mixed",
            rows=2,
            length=8,
            images=False,
            measure_bytes=True,
        )
        for strategy in STRATEGIES
        if strategy.startswith("zero")
        for method in ("dense", "vanilla", "ders_sm")
    ]
    rows = []
    try:
        for job in jobs:  # each in fresh processes, which hold nothing of the one before
            # And which have loaded by then whatever code a training loads.
            first = replace(job, parent=str(small), folder=f"{job.folder}_first", measure_bytes=False)
            run_jobs([first, job], 2, work)
            rows.append(_planned(job))
            shutil.rmtree(job.folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    goals = [
        _goal(
            f"{row['method']}, {row['strategy']}: held over planned, off by",
            abs(row["held_bytes"] / row["planned_bytes"] - 1),
            MAX_MEMORY_DIFFERENCE,
        )
        for row in rows
    ]
    return {"rows": rows, "goals": goals, "seconds": time.perf_counter() - started}


def _planned(job: Job) -> dict[str, Any]:
    result = json.loads((Path(job.folder) / "result.json").read_text())
    params = TrainedParams(**result["params"])
    planned = model_state_bytes(params, stage=int(job.strategy[-1]), num_gpus=2).gpu
    return {
        "method": job.method,
        "strategy": job.strategy,
        "trainable": params.trainable,
        "frozen": params.frozen,
        "held_bytes": result["held_bytes"],
        "planned_bytes": planned,
    }


def tiny_llava(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 64, "intermediate_size": 256}
    recipe = TinyLlava(
        text={"model_type": "llama", "max_position_embeddings": 64, **_TINY},
        vision={**vision, "num_hidden_layers": 2, "num_attention_heads": 4},
        feature_layer=-1,
    )
    save_bundle(recipe.build([" ".join(f"word{n}" for n in range(60))]), folder)
    return folder


def _parents(work: Path) -> dict[bool, Path]:
    torch.manual_seed(0)
    text = TinyLM(text={"model_type": "llama", "max_position_embeddings": 64, "tie_word_embeddings": True, **_TINY})
    save_bundle(text.build([" ".join(f"word{n}" for n in range(60))]), work / "text")
    return {True: tiny_llava(work / "llava"), False: work / "text"}


def _goal(goal: str, figure: float, limit: float) -> dict[str, Any]:
    return {"goal": goal, "figure": figure, "limit": limit, "met": figure <= limit}


def _fresh(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port
