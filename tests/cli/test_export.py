import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import ders
from ders.cli.export import main
from ders.cli.progress import byte_progress


@pytest.fixture
def checkpoint(dense_model: Callable[..., Any], tmp_path: Path) -> Path:
    model = dense_model()
    ders.upcycle(model, layers="all")
    model.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def export(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    main()


def test_one_readable_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    output = checkpoint.parent / "b"
    export(monkeypatch, f"checkpoint={checkpoint}", f"output={output}", "layout=mixtral")
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    assert line.startswith(f"{output}: layout mixtral, ")
    assert "exporting: 100 %" in captured.err
    assert AutoModelForCausalLM.from_pretrained(output).config.model_type == "mixtral"


def test_json_is_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    output = checkpoint.parent / "b"
    export(monkeypatch, f"checkpoint={checkpoint}", f"output={output}", "layout=qwen2_moe", "format=json")
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert (report["output"], report["layout"]) == (str(output), "qwen2_moe")
    assert report["difference"] < 1e-5 * report["scale"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layout=gguf"], "layout must be one of vanilla, mixtral, qwen2_moe: got 'gguf'"),
        (["layout=mixtral", "checkpoint=/nowhere"], "/nowhere: no such folder"),
        ([], "layout"),
    ],
)
def test_errors_are_one_message(
    arguments: list[str], message: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message):
        export(monkeypatch, f"checkpoint={checkpoint}", f"output={checkpoint.parent / 'b'}", *arguments)


def test_the_script_runs_from_elsewhere(checkpoint: Path, command: Any) -> None:
    from conftest import ROOT

    output = checkpoint.parent / "b"
    script = str(ROOT / "scripts" / "export.py")
    result = command(script, f"checkpoint={checkpoint}", f"output={output}", "layout=mixtral", "format=json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["layout"] == "mixtral"


def test_lines_each_tenth_where_there_is_no_terminal(capsys: Any) -> None:
    with byte_progress("copying") as progress:
        for done in range(0, 1_000_001, 10_000):
            progress(done, 1_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "copying: 10 % of 1.0 MB"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with byte_progress("copying") as progress:
        progress(500_000, 1_000_000)
        progress(1_000_000, 1_000_000)
    assert "1.0/1.0 MB" in terminal.getvalue()
