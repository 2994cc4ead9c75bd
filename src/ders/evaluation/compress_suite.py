"""How long compression, analysis and loading take, and how much memory, against the disk itself."""

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ders.checkpoint import TensorFolder
from ders.evaluation.measure import Measured, forget, idle, measure, read_seconds, write_seconds
from ders.evaluation.synthetic import STABLELM_2_1_6B, write_pair

# What the project set out to reach; memory is anonymous, above that of an idle process.
MAX_TIMES_DISK, AIM_TIMES_DISK = 8, 4
MAX_ANONYMOUS_BYTES = 1.5e9
MAX_RATIO = {"sparsify sparsity=0.9": 0.36, "quantize bits=2": 0.385}
MAX_LOADED = 1.1

_LOAD = """
import ders, sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
"""


@dataclass(frozen=True)
class Timed:
    """One command beside the disk.

    Attributes:
        seconds: of the whole command, start-up and waiting for the disk included.
        startup_seconds: of a process that only imports the same, half a second of sleep included.
        disk_seconds: what reading the bytes it reads and writing and syncing the bytes it writes takes by itself.
        times_disk: the first over the last.
        anonymous_bytes: peak, above an idle process.
        expert_ratio: bytes of shared bases and deltas over those of the experts.
    """

    command: str
    seconds: float
    startup_seconds: float
    disk_seconds: float
    times_disk: float
    anonymous_bytes: int
    expert_ratio: float | None = None


def compress_suite(scripts: Path, work: Path) -> dict[str, Any]:
    """Measure on a vanilla MoE of StableLM-2-1.6B's shapes: {"rows": …, "goals": …, "models": …}. Removes what it made.

    Args:
        scripts: the folder of the commands.
        work: an empty or new folder with room for some 15 GB, on the disk to measure.
    """
    work.mkdir(parents=True, exist_ok=True)
    parent, vanilla, output = work / "parent", work / "vanilla", work / "output"
    for folder in (parent, vanilla, output):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        write_pair(STABLELM_2_1_6B, parent, vanilla)
        inputs = [*TensorFolder(vanilla).files, *TensorFolder(parent).files]
        rows, loaded = [], {}
        idle_compress, idle_analyze = _idle("ders.cli.compress"), _idle("ders.cli.analyze")
        for compression in MAX_RATIO:
            command = [sys.executable, str(scripts / "compress.py"), f"checkpoint={vanilla}", f"output={output}"]
            forget(inputs)
            measured = measure([*command, *f"compression={compression} format=json".split()])
            result = json.loads(measured.stdout)
            disk = read_seconds(inputs) + write_seconds(work, result["stored_bytes"])
            rows.append(_timed(compression, measured, idle_compress, disk, result["ratio"]))
            loaded[compression] = _loading(output)
            shutil.rmtree(output)
        forget(inputs)
        measured = measure(
            [sys.executable, str(scripts / "analyze.py"), f"checkpoint={vanilla}", f"output={output}", "format=json"]
        )
        rows.append(_timed("analyze", measured, idle_analyze, read_seconds(inputs)))
        sizes = {folder.name: TensorFolder(folder).num_bytes for folder in (parent, vanilla)}
    finally:
        for folder in (parent, vanilla, output):
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "models": {"shapes": STABLELM_2_1_6B, "stored_bytes": sizes},
        "idle_anonymous_bytes": {"compress": idle_compress.anonymous_bytes, "analyze": idle_analyze.anonymous_bytes},
        "rows": [asdict(row) for row in rows],
        "loading": loaded,
        "goals": _goals(rows, loaded),
    }


def _idle(module: str) -> Measured:
    """A process that imports what a command imports, the second time: the first also reads the libraries."""
    idle(module)
    return idle(module)


def _timed(command: str, measured: Measured, nothing: Measured, disk: float, ratio: float | None = None) -> Timed:
    return Timed(
        command,
        round(measured.seconds, 2),
        round(nothing.seconds, 2),
        round(disk, 2),
        round(measured.seconds / disk, 2),
        max(0, measured.anonymous_bytes - nothing.anonymous_bytes),
        ratio,
    )


def _loading(folder: Path) -> dict[str, float]:
    """Peak anonymous memory of `from_pretrained` in a fresh process, above importing, against the folder's bytes."""
    nothing = _idle("ders, transformers")
    measured = measure([sys.executable, "-c", _LOAD, str(folder)])
    anonymous = max(0, measured.anonymous_bytes - nothing.anonymous_bytes)
    stored = TensorFolder(folder).num_bytes
    return {
        "seconds": round(measured.seconds, 2),
        "anonymous_bytes": anonymous,
        "stored_bytes": stored,
        "ratio": round(anonymous / stored, 4),
    }


def _goals(rows: Iterable[Timed], loaded: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    goals = []

    def goal(name: str, figure: float, limit: float, aim: float | None = None) -> None:
        goals.append({"goal": name, "figure": round(figure, 4), "limit": limit, "aim": aim, "met": figure <= limit})

    for row in rows:
        goal(f"{row.command}: times the disk", row.times_disk, MAX_TIMES_DISK, AIM_TIMES_DISK)
        goal(f"{row.command}: anonymous bytes above idle", row.anonymous_bytes, MAX_ANONYMOUS_BYTES)
        if row.expert_ratio is not None:
            goal(f"{row.command}: of the experts' bytes", row.expert_ratio, MAX_RATIO[row.command])
    for command, figures in loaded.items():
        goal(f"loading {command}: anonymous over stored bytes", figures["ratio"], MAX_LOADED)
    return goals
