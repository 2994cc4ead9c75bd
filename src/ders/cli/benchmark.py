"""`python scripts/benchmark.py`: measurements against goals, as a table and a record."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ders.cli.app import ROOT, UserError, launch, to_plain
from ders.evaluation.compress_suite import compress_suite
from ders.reporting.record import start_benchmark

SUITES = {"compress": compress_suite}


def main() -> None:
    launch(run, "benchmark")


def run(config: DictConfig) -> None:
    """Run one suite, keep its record, show its goals."""
    if config.suite not in SUITES:
        raise UserError(f"suite must be one of {', '.join(SUITES)}: got {config.suite!r}")
    record = start_benchmark(ROOT, to_plain(config), ["python", "scripts/benchmark.py", f"suite={config.suite}"])
    results = SUITES[config.suite](ROOT / "scripts", ROOT / config.work)
    record = {**record, **results}
    file = ROOT / config.results / f"{config.suite}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    if config.format == "json":
        print(json.dumps(record))
    else:
        _show(results, file)


def _show(results: dict[str, Any], file: Path) -> None:
    table = Table(title="Goals", title_justify="left")
    for heading in ("", "figure", "limit", "aim", ""):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for goal in results["goals"]:
        numbers = (f"{goal[key]:,.4g}" if goal[key] is not None else "" for key in ("figure", "limit", "aim"))
        table.add_row(goal["goal"], *numbers, "met" if goal["met"] else "missed")
    Console().print(table)
    print(file)
