import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ders.checkpoint import ModelFolderError, new_folder


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "x") as unfinished:
        (unfinished / "a").write_text("1")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x" / "a").read_text() == "1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> None:
        with new_folder(tmp_path / "x") as unfinished:
            (unfinished / "a").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_or_replaced_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("1")
    with pytest.raises(ModelFolderError, match="x: exists already"), new_folder(tmp_path / "x"):
        pass
    with pytest.raises(RuntimeError), new_folder(tmp_path / "x", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "x" / "old").exists()
    with new_folder(tmp_path / "x", overwrite=True) as unfinished:
        (unfinished / "new").write_text("2")
        assert (tmp_path / "x" / "old").exists()
    assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["new"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    code = (
        "from ders.checkpoint import new_folder\nfrom pathlib import Path\n"
        f"with new_folder(Path({str(tmp_path / 'x')!r})): pass"
    )
    with new_folder(tmp_path / "x"):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode == 1
    assert "another process is writing it" in other.stderr
    assert (tmp_path / "x").is_dir()


def test_a_killed_writer_leaves_no_model_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom ders.checkpoint import new_folder\nfrom pathlib import Path\n"
        f"with new_folder(Path({str(tmp_path / 'x')!r})) as f:\n"
        "    (f / 'model.safetensors').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "x").exists()
    with new_folder(tmp_path / "x") as unfinished:
        assert os.listdir(unfinished) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".x.replaced").mkdir()
    (tmp_path / ".x.replaced" / "old").write_text("1")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "x", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "x" / "old").read_text() == "1"
