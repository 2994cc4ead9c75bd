"""`python scripts/benchmark.py`: measurements against goals, as a table and a record."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ders.cli.app import ROOT, UserError, check_format, launch, to_plain
from ders.evaluation import benchmark
from ders.evaluation.compress_suite import compress_suite
from ders.evaluation.processes_suite import equivalence_suite, zero_memory_suite
from ders.reporting.benchmark import markdown as speed_markdown
from ders.reporting.benchmark import publish
from ders.reporting.record import start_benchmark
from ders.reporting.survival import equivalence_markdown, goals_table, memory_markdown
from ders.reporting.tables import pipes

# What runs whole commands, or several processes, in a folder of its own.
_COMMANDS: dict[str, tuple[Callable[[Path], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "equivalence": (equivalence_suite, equivalence_markdown),
    "zero_memory": (zero_memory_suite, memory_markdown),
}
SUITES = ("compress", *_COMMANDS, *benchmark.SUITES)


def main() -> None:
    launch(run, "benchmark")


def run(config: DictConfig) -> None:
    """Run one suite, keep its record and table, show them."""
    check_format(config.format)
    if config.suite not in SUITES:
        raise UserError(f"suite must be one of {', '.join(SUITES)}: got {config.suite!r}")
    folder = ROOT / config.results / f"benchmark_{config.suite}"
    if config.suite == "compress" or config.suite in _COMMANDS:
        file, record, table = _commands(config, folder)
    else:
        record = benchmark.run_suite(config.suite, {dial: config[dial] for dial in benchmark.DIALS}, ROOT)
        file, table = publish(record, folder), speed_markdown(record)
    print(json.dumps(record) if config.format == "json" else f"{table}\n{file}")


def _commands(config: DictConfig, folder: Path) -> tuple[Path, dict[str, Any], str]:
    own = {key: value for key, value in to_plain(config).items() if key not in benchmark.DIALS}
    record = start_benchmark(ROOT, own, ["python", "scripts/benchmark.py", f"suite={config.suite}"])
    compress = functools.partial(compress_suite, ROOT / "scripts"), markdown
    suite, shown = compress if config.suite == "compress" else _COMMANDS[config.suite]
    record = {**record, **suite(ROOT / config.work)}
    folder.mkdir(parents=True, exist_ok=True)
    file, table = folder / "record.json", shown(record)
    file.write_text(json.dumps(record, indent=1) + "\n")
    (folder / "table.md").write_text(table)
    if config.suite in _COMMANDS:
        (folder / "goals.md").write_text(goals_table(record) + "\n")
    return file, record, table


def markdown(record: dict[str, Any]) -> str:
    """The table of suite=compress: each goal with its figure, met or missed, then each command's times."""
    goals = [["", "figure", "limit", "aim", ""], ["---", "---:", "---:", "---:", "---"]]
    for goal in record["goals"]:
        numbers = [_number(goal[key]) for key in ("figure", "limit", "aim")]
        missed_aim = goal["aim"] is not None and goal["figure"] > goal["aim"]
        met = "met, aim missed" if missed_aim else "met"
        goals.append([goal["goal"], *numbers, met if goal["met"] else "**missed**"])
    times = [["", "seconds", "of which start-up", "disk alone", "memory"], ["---", *["---:"] * 4]]
    for row in record["rows"]:
        seconds = [f"{row[key]:.1f}" for key in ("seconds", "startup_seconds", "disk_seconds")]
        times.append([row["command"], *seconds, f"{row['anonymous_bytes'] / 1e6:,.0f} MB"])
    hardware, commit = record["hardware"], (record["commit"] or "unknown")[:10]
    return (
        f"`{record['command']}`, commit {commit}, {hardware['cores']} cores of {hardware['cpu']}.\n\n"
        f"{pipes(goals)}\n\n{pipes(times)}\n"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
