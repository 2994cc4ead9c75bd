"""`python scripts/faults.py`: whether training survives what happens to it, as a table and a record."""

import json
import shutil
import sys

from omegaconf import DictConfig

from ders.cli.app import ROOT, UserError, check_format, launch, to_plain
from ders.evaluation.fault_suite import METHODS, TRAINERS, Campaign
from ders.reporting.record import start_benchmark
from ders.reporting.survival import faults_markdown, goals_table


def main() -> None:
    launch(run, "faults")


def run(config: DictConfig) -> None:
    """Run the campaign, keep its record and table, show them."""
    check_format(config.format)
    cells = len(METHODS) * len(TRAINERS)
    if not isinstance(config.kills, int) or config.kills < 1 or config.kills % cells:
        raise UserError(f"kills must be a multiple of {cells}, as many in each cell: got {config.kills!r}")
    if not isinstance(config.budget_seconds, int | float) or config.budget_seconds <= 0:
        raise UserError(f"budget_seconds must be positive: got {config.budget_seconds!r}")
    work = ROOT / config.work
    record = start_benchmark(ROOT, to_plain(config), ["python", "scripts/faults.py", f"kills={config.kills}"])
    campaign = Campaign(
        train=ROOT / "train.py",
        work=work,
        kills_per_cell=config.kills // cells,
        budget_seconds=float(config.budget_seconds),
        seed=config.seed,
        commit=None if record["dirty"] is not False else record["commit"],
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    measured = campaign.run()
    if measured is None:
        print(f"the time is over, and the campaign is not: the same command goes on from {work}", file=sys.stderr)
        raise SystemExit(1)
    record |= measured
    shutil.rmtree(work)
    folder = ROOT / config.results / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    file, table = folder / "record.json", faults_markdown(record)
    file.write_text(json.dumps(record, indent=1) + "\n")
    (folder / "table.md").write_text(table)
    (folder / "goals.md").write_text(goals_table(record) + "\n")
    print(json.dumps(record) if config.format == "json" else f"{table}\n{file}")
