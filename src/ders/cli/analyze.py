"""`python scripts/analyze.py`: whether a trained MoE is compressible, in a table, a verdict and two figures."""

import json
from pathlib import Path

from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ders.cli.app import ROOT, UserError, check_format, launch
from ders.cli.folders import model_folder
from ders.cli.progress import byte_progress
from ders.compression.analysis import analyze_folder
from ders.compression.findings import Analysis
from ders.reporting.heatmap import draw_deltas, draw_similarity


def main() -> None:
    launch(run, "analyze")


def run(config: DictConfig) -> None:
    """Analyse one folder, keep figures and numbers, and say what they mean."""
    check_format(config.format)
    checkpoint = model_folder(config.checkpoint)
    output = output_folder(config.output, checkpoint)
    with byte_progress("analysing") as progress:
        analysis = analyze_folder(checkpoint, base=config.base, spectrum=config.spectrum, progress=progress)
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(analysis.to_dict(), allow_nan=False)
    (output / "analysis.json").write_text(text + "\n")
    figures = [
        draw_similarity(analysis, output / "similarity.png"),
        draw_deltas(analysis, output / "deltas.png"),
    ]
    if config.format == "json":
        print(text)
        return
    Console().print(table_of(analysis))
    print(*analysis.verdict.sentences, sep="\n")
    print(f"\n{output / 'analysis.json'}, {', '.join(str(figure) for figure in figures)}")


def output_folder(output: str | None, checkpoint: Path) -> Path:
    """Where figures and numbers go: the given folder, or one in outputs/analysis/; never into the model's.

    Raises:
        UserError: the given folder is the model's, or inside it.
    """
    model = checkpoint.resolve()
    if output is None:
        # A run keeps its model in `model/`: its own name tells more.
        name = model.parent.name if model.name == "model" else model.name
        return ROOT / "outputs" / "analysis" / name
    folder = Path(output)
    if folder.resolve().is_relative_to(model):
        raise UserError(f"output={output} is inside the model folder, which an analysis leaves alone: choose another")
    return folder


def table_of(analysis: Analysis) -> Table:
    """One line per layer and matrix: the worst of its experts."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layer", justify="right")
    table.add_column("matrix", no_wrap=True)
    against = "mean" if analysis.base.kind == "mean" else "FFN"
    for header in (f"{against}–expert\ncosine ≥", "expert–expert\ncosine ≥", "‖Δ‖/‖base‖\n≤", "kurtosis\n≤"):
        table.add_column(header, justify="right")
    for layer in analysis.layers:
        for name, matrix in layer.matrices.items():
            table.add_row(
                str(layer.index),
                name,
                f"{matrix.min_base_cosine:.6f}",
                "–" if matrix.min_expert_cosine is None else f"{matrix.min_expert_cosine:.6f}",
                f"{max(matrix.ratios):.4f}",
                "–" if matrix.max_kurtosis is None else f"{matrix.max_kurtosis:.1f}",
            )
    return table
