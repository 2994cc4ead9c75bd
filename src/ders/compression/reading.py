"""Which layouts of a trained MoE can be read."""

from collections.abc import Callable
from pathlib import Path

from ders.checkpoint import ModelFolderError, TensorFolder
from ders.compression.own import is_own, read_own
from ders.compression.source import MoESource

# By name: whether a folder has the layout, and how it is read.
READERS: dict[str, tuple[Callable[[TensorFolder], bool], Callable[[TensorFolder], MoESource]]] = {
    "ders": (is_own, read_own),
}


def read_source(folder: Path) -> MoESource:
    """The trained MoE in a folder: ours, or of any layout in `READERS`.

    Raises:
        ModelFolderError: the folder is damaged, or holds no MoE of a known layout.
    """
    tensors = TensorFolder(folder)
    for fits, read in READERS.values():
        if fits(tensors):
            return read(tensors)
    raise ModelFolderError(f"{folder}: holds no MoE of a known layout ({', '.join(READERS)})")
