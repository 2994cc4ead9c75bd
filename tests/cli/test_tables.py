import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ders.cli.app import prepare_hydra
from ders.cli.tables import _run_folders, main, read_claim, update_readme
from ders.reporting import read_record


def tables(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", *arguments])
    main()


@pytest.fixture
def results(tmp_path: Path, run_job: Callable[..., Path]) -> Path:
    """Real records of two methods, marked as from a clean tree."""
    folder = tmp_path / "results" / "methods"
    folder.mkdir(parents=True)
    prepare_hydra()
    runs = _run_folders(read_claim("methods"), "outputs")
    for method in ("dense", "ders_sm"):
        record = json.loads((run_job(f"method={method}") / "record.json").read_text())
        name = runs[f"method={method} seed=0"].name
        (folder / f"{name}.json").write_text(json.dumps(record | {"dirty": False, "commit": "a" * 40}))
    (folder / "stale-0123456789.json").write_text("a run that the claim does not list any more")
    return tmp_path / "results"


def test_table_and_figure_from_records(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tables(monkeypatch, "claim=methods", "collect=false", f"results={results}")
    table = (results / "methods" / "table.md").read_text()
    assert "| ders_sm sparsity 0.9999 | 1,192 |" in table
    assert table.index("| dense |") < table.index("| ders_sm")
    assert (results / "methods" / "figure.png").exists()
    assert table in capsys.readouterr().out


def test_json_is_one_line(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tables(monkeypatch, "claim=methods", "collect=false", f"results={results}", "format=json")
    (line,) = capsys.readouterr().out.splitlines()
    assert set(json.loads(line)["methods"]) == {"dense", "ders_sm sparsity 0.9999"}


def test_only_clean_and_finished_records_are_collected(
    run_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = run_job("method=dense")
    record = json.loads((source / "record.json").read_text())
    prepare_hydra()
    runs = _run_folders(read_claim("methods"), str(tmp_path / "runs"))
    states = [{"dirty": False}, {"dirty": True}, {"dirty": False, "status": "interrupted"}]
    for seed, state in enumerate(states):
        folder = runs[f"method=vanilla seed={seed}"]
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(record | {"seed": seed, "commit": "b" * 40} | state))
    results = tmp_path / "results" / "methods"
    results.mkdir(parents=True)
    (results / "stale-0123456789.json").write_text("{}")
    tables(monkeypatch, "claim=methods", f"results={results.parent}", f"output_dir={tmp_path / 'runs'}")
    assert [read_record(file)["seed"] for file in results.glob("*.json")] == [0]


def test_an_unknown_claim_lists_the_known(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit, match=r"there is no experiments/nothing\.yaml. Claims: .*methods"):
        tables(monkeypatch, "claim=nothing")
    assert read_claim("methods")["dial"] is None


def test_the_readme_shows_the_tables_of_results(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "table.md").write_text("new\n")
    readme.write_text(
        "a\n<!-- table:methods -->\nold\n<!-- /table -->\nb\n<!-- table:none -->\nkept\n<!-- /table -->\n"
    )
    update_readme(readme, tmp_path)
    assert readme.read_text() == (
        "a\n<!-- table:methods -->\nnew\n<!-- /table -->\nb\n<!-- table:none -->\nkept\n<!-- /table -->\n"
    )
