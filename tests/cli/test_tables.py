import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from ders.cli.tables import main, read_claim, update_readme
from ders.reporting import read_record


def tables(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", *arguments])
    main()


@pytest.fixture
def results(tmp_path: Path, run_job: Callable[..., Path]) -> Path:
    """Real records of two methods, marked as from a clean tree."""
    folder = tmp_path / "results" / "methods"
    folder.mkdir(parents=True)
    for method in ("dense", "ders_sm"):
        run = run_job(f"method={method}")
        record = json.loads((run / "record.json").read_text()) | {"dirty": False, "commit": "a" * 40}
        (folder / f"{run.name}.json").write_text(json.dumps(record))
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
    outputs: Path, run_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from ders.cli.app import prepare_hydra, to_plain
    from ders.cli.identity import run_folder

    source = run_job("method=dense")
    record = json.loads((source / "record.json").read_text())
    prepare_hydra()
    GlobalHydra.instance().clear()
    states = [{"dirty": False}, {"dirty": True}, {"dirty": False, "status": "interrupted"}]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for seed, state in enumerate(states):
            plain = to_plain(compose("train", overrides=["method=vanilla", f"seed={seed}", f"output_dir={outputs}"]))
            folder = run_folder(plain, ROOT)
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(json.dumps(record | {"seed": seed, "commit": "b" * 40} | state))
    tables(monkeypatch, "claim=methods", f"results={tmp_path}", f"output_dir={outputs}")
    assert [read_record(file)["seed"] for file in (tmp_path / "methods").glob("*.json")] == [0]


def test_an_unknown_claim_lists_the_known(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit, match=r"there is no experiments/nothing\.yaml. Claims: methods"):
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
