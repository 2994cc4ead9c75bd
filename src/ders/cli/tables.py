"""`python scripts/tables.py`: from the records of claims to tables and figures in `results/`."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from ders.cli.app import ROOT, UserError, launch, to_plain
from ders.cli.identity import run_folder
from ders.cli.sweeper import expand
from ders.reporting.figures import draw_claim
from ders.reporting.record import Record, read_record, write_record
from ders.reporting.tables import markdown, percent, rows_of

log = logging.getLogger(__name__)


def main() -> None:
    launch(build_tables, "tables")


def build_tables(config: DictConfig) -> None:
    results = ROOT / config.results
    claims = [config.claim] if config.claim else sorted(file.stem for file in (ROOT / "experiments").glob("*.yaml"))
    built: dict[str, Any] = {}
    for name in claims:
        claim = read_claim(name)
        folder = results / name
        if config.collect:
            _collect(name, claim, config.output_dir, folder)
        records = [read_record(file) for file in sorted(folder.glob("*.json"))]
        if not records:
            log.warning("%s: no records yet. Run: python train.py experiments=%s", name, name)
            continue
        rows = sorted(rows_of(records), key=lambda row: _place(row.records[0], claim["runs"]))
        table = markdown(rows, claim["title"], f"python train.py experiments={name}")
        (folder / "table.md").write_text(table)
        draw_claim(rows, claim["dial"], claim["title"], folder / "figure.png")
        built[name] = {row.label: percent(row.mean("test/accuracy"), row.spread("test/accuracy")) for row in rows}
        if config.format == "table":
            print(f"{table}\n{folder / 'table.md'}, {folder / 'figure.png'}\n")
    if config.readme:
        update_readme(ROOT / "README.md", results)
    if config.format == "json":
        print(json.dumps(built))


def read_claim(name: str) -> dict[str, Any]:
    """Runs, title and dial of a claim.

    Raises:
        UserError: there is no such claim.
    """
    file = ROOT / "experiments" / f"{name}.yaml"
    if not file.exists():
        known = ", ".join(sorted(f.stem for f in file.parent.glob("*.yaml")))
        raise UserError(f"claim={name}: there is no experiments/{name}.yaml. Claims: {known}")
    sweeper = yaml.safe_load(file.read_text())["hydra"]["sweeper"]
    return {"dial": None, **sweeper}


def _collect(name: str, claim: dict[str, Any], outputs: str, folder: Path) -> None:
    """Copy the records of a claim's runs: clean tree and finished only; anything else is named and left."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for overrides in expand(claim["runs"]):
            plain = to_plain(compose("train", overrides=[*overrides, f"output_dir={outputs}"]))
            run = run_folder(plain, ROOT)
            file = run / "record.json"
            if not file.exists():
                log.warning("%s: %s has not been run", name, " ".join(overrides))
                continue
            record = read_record(file)
            if record["status"] != "finished" or record["dirty"] is not False:
                why = record["status"] if record["status"] != "finished" else "from a tree with uncommitted changes"
                log.warning("%s: %s left out: %s", name, " ".join(overrides), why)
                continue
            write_record(record, folder / f"{run.name}.json")


def _place(record: Record, runs: list[str]) -> int:
    """Where a record's run stands in the claim's list."""
    for place, overrides in enumerate(expand(runs)):
        given = dict(override.split("=", 1) for override in overrides)
        shown = {"method": record["method"]} | {k: str(v) for k, v in record["config"].items() if k != "method"}
        if all(shown.get(key) == value for key, value in given.items()):
            return place
    return len(expand(runs))


def update_readme(readme: Path, results: Path) -> None:
    """Put each claim's table between its markers, `<!-- table:<claim> -->` and `<!-- /table -->`."""

    def fill(match: re.Match[str]) -> str:
        file = results / match[1] / "table.md"
        return f"<!-- table:{match[1]} -->\n{file.read_text()}<!-- /table -->" if file.exists() else match[0]

    if readme.exists():
        text = readme.read_text()
        readme.write_text(re.sub(r"<!-- table:(\w+) -->\n.*?<!-- /table -->", fill, text, flags=re.DOTALL))
