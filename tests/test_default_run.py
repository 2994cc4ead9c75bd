"""The default run at its true length."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_default_run_learns(command: Any, tmp_path: Path) -> None:
    result = command(str(ROOT / "train.py"), f"output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    record = json.loads(Path(result.stdout.splitlines()[-1]).read_text())
    metrics = {name: score["value"] for name, score in record["metrics"].items()}
    assert metrics["parent/accuracy"] >= metrics["parent/prior"] + 0.25
    assert metrics["test/accuracy"] >= metrics["parent/accuracy"] - 0.01
    assert record["peak_gib"] <= 3
