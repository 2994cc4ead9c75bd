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
from ders.reporting.comparisons import SINGLE_RUN
from ders.reporting.heatmap import draw_similarity
from ders.reporting.paper import NAMES, Printed, by_key, lines_of, measured_key
from ders.reporting.paper_figures import draw_paper
from ders.reporting.paper_notes import Added, computed
from ders.reporting.paper_table import STAND_INS, as_data, paper_markdown
from ders.reporting.published import load_published
from ders.reporting.record import read_record
from ders.reporting.tables import Row, markdown, rows_of
from ders.reporting.verdicts import Verdict, judge, load_claims, verdicts_markdown

log = logging.getLogger(__name__)


def paper_table(command: str, claim: dict[str, Any], rows: list[Row], folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """The table of a claim that stands beside tables of the paper, and its lines as data; draws its figure."""
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
            "ratios": {i: {name: m.ratios for name, m in layer.matrices.items()} for i, layer in ends.items()},
        }
        file = _similarity_folder(folder) / f"{run.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept, indent=1) + "\n")
        if number == 0:
            draw_similarity(analysis, folder / "figure.png")


def _similarity_folder(folder: Path) -> Path:
    """Apart from the records, which are all the JSON beside the table."""
    return folder / "similarity"


def kept_similarity(folder: Path) -> dict[str, Any]:
    """What `keep_similarity` kept, by the name of the run."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(_similarity_folder(folder).glob("*.json"))}


def smallest_cosines(folder: Path) -> list[float]:
    """Of each analysed run that the claim still lists; a mean of experts for a base is nearer to them than any FFN."""
    found = []
    for file in sorted(_similarity_folder(folder).glob("*.json")):
        kept = json.loads(file.read_text())
        if kept["base"] != "parent" or not (folder / file.name).exists():
            continue
        matrices = [m for layer in kept["layers"].values() for m in layer.values()]
        found.append(min(cosine for matrix in matrices for row in matrix for cosine in row))
    return found


def verdicts_of(claims: dict[str, dict[str, Any]], results: Path) -> list[Verdict]:
    """Verdicts on all of the paper's claims, from every record in the folders of these claims of ours."""
    ours = by_key(rows_behind(claims, results))
    similar = [name for name, claim in claims.items() if claim["figure"] == "similarity" and claim["published"]]
    cosines = [cosine for name in similar for cosine in smallest_cosines(results / name)]
    return [judge(claim, load_published(), ours, cosines) for claim in load_claims()]


def rows_behind(claims: dict[str, dict[str, Any]], results: Path) -> list[Row]:
    """Every row of ours in the folders of those claims that repeat tables of the paper."""
    named = [name for name, claim in claims.items() if claim["published"]]
    # A run that several claims list has a copy of its record in each.
    records = {file.name: file for name in named for file in sorted((results / name).glob("*.json"))}
    return rows_of([read_record(file) for file in records.values()])


def on_tables(verdicts: list[Verdict], published: list[str]) -> list[Verdict]:
    """Those that rest on some of these tables."""
    return [verdict for verdict in verdicts if set(verdict.tables) & set(published)]


def write_verdicts(verdicts: list[Verdict], file: Path, rows: list[Row]) -> None:
    """All claims of the paper in one file; `rows` are ours, of which those of the paper's models are told of."""
    heading = (
        "# The paper's claims\n\nEach in our words, with what the paper's printed numbers say of it and what our runs "
        "say. A claim stands with all of its comparisons and falls with one. Supported and contradicted need more than "
        f"the noise. Of printed scores that is {SINGLE_RUN:g} point where a row is to be better or worse, for they are "
        "of single runs; where a row may lose up to a margin, the margin allows for it. Of ours it is an interval from "
        "the spread over seeds; the 5% that it leaves are divided by the number of a claim's comparisons that chance "
        "may decide (Bonferroni's correction), while sizes are exact.\n\n"
        f"{_what_was_run(rows)}\n\n`python scripts/tables.py` writes this file from the records."
    )
    file.write_text(verdicts_markdown(verdicts, heading=heading))


def _what_was_run(rows: list[Row]) -> str:
    """Scale and seeds of ours; at scale tiny, what its scores are of."""
    mine = [row for row in rows if measured_key(row).model in NAMES]
    if not mine:
        return "Of ours nothing was run yet."
    scales = sorted({record["scale"] for row in mine for record in row.records})
    seeds = sorted({len(row.records) for row in mine})
    plural = "" if seeds == [1] else "s"
    told = f"Ours was run at scale {' and '.join(scales)}, with {' or '.join(map(str, seeds))} seed{plural} a row."
    return f"{told} {STAND_INS}" if "tiny" in scales else told
