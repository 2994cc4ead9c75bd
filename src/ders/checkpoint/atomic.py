"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ders.checkpoint.errors import ModelFolderError


def refuse_overlap(output: Path, *inputs: Path) -> None:
    """An output must be another folder than what it is made from, and not lie inside it.

    Raises:
        ModelFolderError: it is, or does.
    """
    for folder in inputs:
        if output.resolve().is_relative_to(folder.resolve()):
            raise ModelFolderError(
                f"{output}: is {folder} itself or inside it, which is read here. Choose another output"
            )


@contextlib.contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder to fill; leaving the block syncs it to the disk and gives it its name.

    On an error what was written is removed. What a killed process left is removed when the same folder is written
    again; it bears the name `.<folder>.unfinished`, which no loader takes for a model.

    Raises:
        ModelFolderError: the folder exists (unless `overwrite`, which then replaces it at the very end), or another
            process is writing it.
    """
    folder = Path(os.path.abspath(folder))
    _refuse_existing(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    replaced = folder.with_name(f".{folder.name}.replaced")
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ModelFolderError(
            f"{folder}: another process is writing it. Wait for it, or choose another folder"
        ) from None
    try:
        _refuse_existing(folder, overwrite)  # a process we waited for may just have written it
        if replaced.exists() and not folder.exists():  # an earlier attempt stopped between the two renames
            replaced.rename(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        for file in (*unfinished.rglob("*"), unfinished):
            _sync(file)
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _refuse_existing(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise ModelFolderError(f"{folder}: exists already. Choose another folder, remove it, or set overwrite=true")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
