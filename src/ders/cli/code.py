"""`python scripts/eval.py evaluation=…`: a model's programs, run in a sandbox and counted."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ders.checkpoint import write_text
from ders.cli.app import ROOT, UserError, to_plain
from ders.cli.instantiation import instantiate
from ders.evaluation.code_scoring import CodeScore, score_code
from ders.evaluation.sandbox import Sandbox, SandboxError
from ders.models.bundle import load_bundle, stored_bytes
from ders.reporting.programs import differing_dials, programs_markdown
from ders.reporting.record import start_benchmark
from ders.training.allocator import keep_freed_memory


def score_programs(config: DictConfig, checkpoint: Path, dtype: torch.dtype | str) -> None:
    """Print pass@1 of one folder; with `record=NAME` it becomes a line of that name in `results/<evaluation>/`.

    Raises:
        UserError: running code is not allowed, or there is no sandbox, or the record would say of itself that it comes
            from sources with uncommitted changes; before the model is loaded.
    """
    if config.allow_code_execution is not True:
        raise UserError(
            "this evaluation runs programs that the model writes, in a sandbox: add allow_code_execution=true"
        )
    evaluation = instantiate(config.evaluation)
    try:
        sandbox = Sandbox(evaluation.time_limit)
    except SandboxError as error:
        raise UserError(str(error)) from error
    folder = ROOT / config.results / evaluation.name
    record = None if config.record is None else _begin(config, folder)
    problems = evaluation.problems()
    keep_freed_memory()  # a growing key-value cache is a larger tensor at each token
    bundle = load_bundle(checkpoint, dtype=dtype)
    bundle.model.to(config.device)
    found = score_code(bundle, problems, evaluation, sandbox)
    if config.samples is not None:
        write_text(Path(config.samples), "".join(json.dumps(row) + "\n" for row in found.samples))
    about = {"checkpoint": str(checkpoint), "evaluation": evaluation.name, "stored_bytes": stored_bytes(checkpoint)}
    told = {**about, "dtype": str(bundle.model.dtype).removeprefix("torch."), **found.to_dict()}
    if record is not None:
        write_text(folder / f"{config.record}.json", json.dumps({**record, "result": told}, indent=1) + "\n")
        write_text(folder / "table.md", programs_markdown(_kept(folder)))
    print(json.dumps(told) if config.format == "json" else _sentences(told, found, config.samples))


def _begin(config: DictConfig, folder: Path) -> dict[str, Any]:
    if re.fullmatch(r"\w[\w.+-]*", str(config.record)) is None:
        raise UserError(f"record must be a name of letters, digits and . _ + -: got {config.record!r}")
    record = start_benchmark(ROOT, to_plain(config), ["python", "scripts/eval.py", f"record={config.record}"])
    if record["dirty"] is not False:
        raise UserError("record=…: there are uncommitted changes, or no git to ask: commit first")
    for name, kept in _kept(folder).items():
        if differing := differing_dials(kept, record["config"]["evaluation"]):
            raise UserError(
                f"{folder / name}.json was made with another {' and '.join(differing)}: choose the same, or a "
                "results=… of its own"
            )
    return record


def _kept(folder: Path) -> dict[str, Any]:
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


def _sentences(told: dict[str, Any], found: CodeScore, samples: str | None) -> str:
    low, high = found.interval
    lines = [
        f"{told['checkpoint']} on {told['evaluation']}, {told['stored_bytes'] / 1e6:,.2f} MB, {told['dtype']}",
        f"pass@1 {100 * told['pass@1']:.1f} % ({found.num_passed} of {len(found.samples)} problems; "
        f"95 % interval {100 * low:.1f} to {100 * high:.1f}), {found.num_timed_out} timed out",
        "greedy, " + ", ".join(f"{name} {value}" for name, value in found.options.items() if name != "num_problems"),
    ]
    if len(found.samples) < found.num_available:
        lines.insert(2, f"only the first {len(found.samples)} of {found.num_available} problems were asked")
    if samples is not None:
        lines.append(f"all programs: {samples}")
    return "\n".join(lines)
