"""The speed benchmarks by name, and without Hydra: `python -m ders.evaluation.benchmark suite=layer output=DIR`.

That form needs torch and transformers alone of what a command of `scripts/` needs, for a machine that has little else.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ders.evaluation.decode_suite import decode_suite
from ders.evaluation.layer_suite import layer_suite
from ders.evaluation.options import Options
from ders.evaluation.train_suite import train_suite
from ders.reporting.benchmark import markdown, publish
from ders.reporting.record import start_benchmark

SUITES: dict[str, Callable[[Options], dict[str, Any]]] = {
    "layer": layer_suite,
    "decode": decode_suite,
    "train": train_suite,
}
DIALS = tuple(field.name for field in fields(Options))


def run_suite(suite: str, dials: dict[str, Any], repository: Path) -> dict[str, Any]:
    """The record of one suite: what was run on what, rows, goals.

    Args:
        dials: of `Options`.

    Raises:
        ValueError: there is no such suite, or a dial is out of range.
    """
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}: got {suite!r}")
    options = Options(**dials)
    changed = [f"{f.name}={dials[f.name]}" for f in fields(Options) if dials.get(f.name, f.default) != f.default]
    command = ["python", "scripts/benchmark.py", f"suite={suite}", *changed]
    record = start_benchmark(repository, {"suite": suite, **dials}, command)
    return {**record, **SUITES[suite](options)}


def parse(arguments: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`key=value` words: the dials of `Options`, and the rest (suite, format, output).

    Raises:
        ValueError: a word of another form, or an unknown key.
    """
    dials: dict[str, Any] = {}
    others: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"expected key=value: got {argument!r}")
        if key == "budget_seconds":
            try:
                dials[key] = float(value)
            except ValueError:
                raise ValueError(f"budget_seconds must be a number of seconds: got {value!r}") from None
        elif key in DIALS:
            dials[key] = value
        elif key in ("suite", "format", "output"):
            others[key] = value
        else:
            raise ValueError(f"unknown key {key!r}: there are suite, format, output, {', '.join(DIALS)}")
    if others.get("format", "json") not in ("table", "json"):
        raise ValueError(f"format must be table or json: got {others['format']!r}")
    return dials, others


def main() -> None:
    """Print the record as one line of JSON, or with `format=table` as tables; `output=DIR` also keeps it there."""
    try:
        dials, others = parse(sys.argv[1:])
        record = run_suite(others.get("suite", "layer"), dials, Path(__file__).resolve().parents[3])
    except ValueError as error:
        sys.exit(f"error: {error}")
    if "output" in others:
        publish(record, Path(others["output"]))
    print(markdown(record) if others.get("format") == "table" else json.dumps(record))


if __name__ == "__main__":
    main()
