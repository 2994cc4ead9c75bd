"""Claims of the paper: their tables beside ours, the verdicts, and figure 1."""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch

from ders.accounting.formula import Architecture
from ders.cli.app import composed
from ders.cli.build import upcycle_by_config
from ders.cli.instantiation import instantiate
from ders.compression.analysis import analyze_folder
from ders.reporting.heatmap import draw_similarity
from ders.reporting.paper import Printed, by_key, lines_of
from ders.reporting.paper_figures import draw_paper
from ders.reporting.paper_notes import Added, computed
from ders.reporting.paper_table import as_data, paper_markdown
from ders.reporting.published import load_published
from ders.reporting.record import read_record
from ders.reporting.tables import Row, markdown, rows_of
from ders.reporting.verdicts import Verdict, judge, load_claims, verdicts_markdown

log = logging.getLogger(__name__)


def paper_table(name: str, claim: dict[str, Any], rows: list[Row], folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """The table of a claim that stands beside tables of the paper, and its lines as data; draws its figure."""
    command = f"python train.py experiments={name}"
    if claim["figure"] == "similarity":
        return markdown(rows, claim["title"], command), []
    lines = lines_of(claim["published"], load_published(), rows)
    draw_paper(lines, claim["title"], folder / "figure.png")
    table = paper_markdown(lines, load_published(), formula, claim["title"], command)
    return table, [as_data(line, formula) for line in lines]


def formula(row: Printed) -> Added:
    """Added parameters of a printed row by the paper's formula, at full size."""
    return computed(row, architecture_of(row["model"]))


@functools.cache
def architecture_of(model: str) -> Architecture:
    """Shapes of a model of the paper at full size; nothing is fetched or allocated."""
    config = composed("train", [f"model={model}", "method=vanilla", "scale=paper"])
    with torch.device("meta"):
        dense = instantiate(config.model).dense()
    upcycle_by_config(dense, config)
    return Architecture.of(dense)


def keep_similarity(runs: dict[str, Path], folder: Path) -> None:
    """Cosines of the first and the last MoE layer of each run whose model is here; the first run's as a figure."""
    for number, run in enumerate(runs.values()):
        if not (folder / f"{run.name}.json").exists():
            continue
        if not (run / "model" / "config.json").exists():
            log.warning("%s: no model here any more, so its cosines stay as they were", run)
            continue
        analysis = analyze_folder(run / "model", spectrum="none")
        ends = {layer.index: layer for layer in (analysis.layers[0], analysis.layers[-1])}
        kept = {
            "base": analysis.base.kind,
            "layers": {i: {name: m.cosines for name, m in layer.matrices.items()} for i, layer in ends.items()},
        }
        file = _similarity_folder(folder) / f"{run.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept, indent=1) + "\n")
        if number == 0:
            draw_similarity(analysis, folder / "figure.png")


def _similarity_folder(folder: Path) -> Path:
    """Apart from the records, which are all the JSON beside the table."""
    return folder / "similarity"


def smallest_cosines(folder: Path) -> list[float]:
    """Of each analysed run."""
    found = []
    for file in sorted(_similarity_folder(folder).glob("*.json")):
        matrices = [m for layer in json.loads(file.read_text())["layers"].values() for m in layer.values()]
        found.append(min(cosine for matrix in matrices for row in matrix for cosine in row))
    return found


def verdicts_of(claims: dict[str, dict[str, Any]], results: Path) -> list[Verdict]:
    """Verdicts on all of the paper's claims, from every record in the folders of these claims of ours."""
    named = {name: claim for name, claim in claims.items() if claim["published"]}
    # A run that several claims list has a copy of its record in each.
    records = {file.name: file for name in named for file in sorted((results / name).glob("*.json"))}
    ours = by_key(rows_of([read_record(file) for file in records.values()]))
    similar = [name for name, claim in named.items() if claim["figure"] == "similarity"]
    cosines = [cosine for name in similar for cosine in smallest_cosines(results / name)]
    return [judge(claim, load_published(), ours, cosines) for claim in load_claims()]


def on_tables(verdicts: list[Verdict], published: list[str]) -> list[Verdict]:
    """Those that rest on some of these tables."""
    return [verdict for verdict in verdicts if set(verdict.tables) & set(published)]


def write_verdicts(verdicts: list[Verdict], file: Path) -> None:
    """All claims of the paper in one file."""
    heading = (
        "# The paper's claims\n\nEach in our words, with what the paper's printed numbers say of it and what our runs "
        "say. Supported and contradicted need more than the noise; a claim falls with one comparison and stands with "
        "all.\n`python scripts/tables.py` writes this file from the records."
    )
    file.write_text(verdicts_markdown(verdicts, heading=heading))
