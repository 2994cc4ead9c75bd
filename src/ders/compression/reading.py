"""Which layouts of a trained MoE can be read."""

from collections.abc import Callable
from pathlib import Path

from ders.checkpoint import ModelFolderError, TensorFolder
from ders.compression.moe_llava import is_moe_llava, read_moe_llava
from ders.compression.own import is_own, read_own
from ders.compression.source import MoESource
from ders.compression.stock import is_mixtral, is_qwen2_moe, read_mixtral, read_qwen2_moe

# By name: whether a folder has the layout, and how it is read.
READERS: dict[str, tuple[Callable[[TensorFolder], bool], Callable[[TensorFolder], MoESource]]] = {
    "ders": (is_own, read_own),
    "mixtral": (is_mixtral, read_mixtral),
    "qwen2_moe": (is_qwen2_moe, read_qwen2_moe),
    "moe_llava": (is_moe_llava, read_moe_llava),
}


def read_source(folder: Path) -> MoESource:
    """The trained MoE in a folder: ours, or of any layout in `READERS`.

    Raises:
        ModelFolderError: the folder is damaged, its weights are pickled, or it holds no MoE of a known layout.
    """
    _refuse_pickles(folder)
    tensors = TensorFolder(folder)
    tensors.verify()
    for fits, read in READERS.values():
        if fits(tensors):
            return read(tensors)
    raise ModelFolderError(f"{folder}: holds no MoE of a known layout ({', '.join(READERS)})")


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(folder.glob("*.bin"))
    if not pickles or any(folder.glob("*.safetensors")):
        return
    raise ModelFolderError(
        f"{folder}: its weights are pickled ({pickles[0].name}), which safetensors are read instead of. Convert them "
        f"first, inside the folder:\n"
        'python -c "import glob, torch; from safetensors.torch import save_file; '
        "[save_file({k: v.contiguous().clone() for k, v in torch.load(f, weights_only=True).items()}, "
        "f[:-4] + '.safetensors') for f in glob.glob('*.bin')]\""
    )
