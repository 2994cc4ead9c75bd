"""`python scripts/data.py`: what is wrong with data before anyone pays for a training step; data as a harness' task."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer

from ders.cli.app import ROOT, UserError, check_format, launch
from ders.cli.instantiation import instantiate
from ders.data import DataSource
from ders.data.checking import Found, Lengths, SplitReport, check_split
from ders.data.conversation import Encoder
from ders.harness.tasks import write_task

ACTIONS = ("check", "harness")
HARNESSES = {
    "lm-eval": ".venv-lm-eval/bin/python -m ders.harness.lm_eval --model ders --model_args pretrained=DIR,prompt=auto",
    "lmms-eval": ".venv-lmms-eval/bin/lmms-eval --model ders --model_args pretrained=DIR",
}


def main() -> None:
    launch(run, "data")


def run(config: DictConfig) -> None:
    """Check every split, ending the process with 1 where rows cannot be used; or write one as a harness' task."""
    check_format(config.format)
    if config.action not in ACTIONS:
        raise UserError(f"action must be {' or '.join(ACTIONS)}: got {config.action!r}")
    for dial in ("workers", "max_length"):
        if config[dial] is not None and (not isinstance(config[dial], int) or config[dial] < 1):
            raise UserError(f"{dial} must be a whole number from 1 on: got {config[dial]!r}")
    source: DataSource = instantiate(config.data)
    name = HydraConfig.get().runtime.choices["data"]
    if config.action == "harness":
        _write_task(config, name, source)
        return
    tokenizer = None if config.tokenizer is None else _tokenizer(Path(config.tokenizer))
    prepared = source.prepare(ROOT / config.output_dir / "cache")
    reports = {}
    for split in prepared.files:
        encoder = None if tokenizer is None else _encoder(source, tokenizer, split, config.max_length)
        with _progress(f"images of {split}") as progress:
            reports[split] = check_split(prepared, split, encoder, workers=config.workers, progress=progress)
    faulty = sum(report.faulty_rows for report in reports.values())
    if config.format == "json":
        splits = {split: dataclasses.asdict(report) for split, report in reports.items()}
        print(json.dumps({"data": name, "faulty_rows": faulty, "splits": splits}))
    else:
        for split, report in reports.items():
            print("\n".join([f"{name}, {split}", *(f"  {line}" for line in _lines(report))]))
        print(f"{faulty} rows cannot be used" if faulty else "every row can be used")
    if faulty:
        sys.exit(1)


def _write_task(config: DictConfig, name: str, source: DataSource) -> None:
    if config.output is None:
        raise UserError("action=harness writes a folder: name it, output=DIR")
    prepared = source.prepare(ROOT / config.output_dir / "cache")
    about = write_task(Path(config.output), name, source, prepared, config.split)
    if config.format == "json":
        print(json.dumps({**about, "folder": config.output}))
    else:
        print(f"{about['num_questions']:,} questions; `make {about['harness']}` once, then")
        print(f"{HARNESSES[about['harness']]} --tasks {about['task']} --include_path {config.output}")


def _tokenizer(folder: Path) -> Any:
    if not folder.is_dir():
        raise UserError(f"tokenizer={folder}: no such folder. Give one that holds a Hugging Face tokenizer")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _encoder(source: DataSource, tokenizer: Any, split: str, max_length: int | None) -> Encoder:
    side = source.image_size // source.patch_size if source.image_size and source.patch_size else 0
    encoder = source.encoder(tokenizer, side**2, split)
    return encoder if max_length is None else dataclasses.replace(encoder, max_length=max_length)


def _lines(report: SplitReport) -> Iterator[str]:
    yield f"{report.rows:,} rows, {report.faulty_rows:,} of them faulty; text only {100 * report.text_only:.1f} %"
    yield (
        f"{report.images:,} images, {report.shared_images:,} of them used by several rows (at most "
        f"{report.most_rows_of_an_image:,})"
    )
    yield from _length_lines("words", report.words)
    yield from _length_lines("tokens", report.tokens)
    if report.cut is not None:
        cut = report.cut
        yield (
            f"max_length={cut.max_length}: {cut.rows:,} rows lose their end, {cut.without_answer:,} every answer, "
            f"{cut.within_image:,} part of an image"
        )
    yield from _found_lines("fault", report.faults)
    yield from _found_lines("note", report.notes)


def _length_lines(unit: str, lengths: Lengths | None) -> Iterator[str]:
    if lengths is not None:
        yield f"{unit} a row: median {lengths.median:,.0f}, 95 % up to {lengths.p95:,}, longest {lengths.max:,}"


def _found_lines(what: str, found: dict[str, Found]) -> Iterator[str]:
    for kind, met in found.items():
        yield f"{what} {kind}: {met.count:,}"
        yield from (f"  {place}" for place in met.first)
        if met.count > len(met.first):
            yield f"  … and {met.count - len(met.first):,} more"


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line each tenth elsewhere; always on stderr."""
    if not sys.stderr.isatty():
        told = 0

        def report(done: int, total: int) -> None:
            nonlocal told
            if 10 * done // total > told:
                told = 10 * done // total
                print(f"{label}: {done:,} of {total:,}", file=sys.stderr, flush=True)

        yield report
        return
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
