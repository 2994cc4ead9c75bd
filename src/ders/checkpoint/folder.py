"""Reading a folder of safetensors without loading it."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ders.checkpoint.errors import ModelFolderError
from ders.checkpoint.hashing import combine, tensor_sha256

INDEX = "model.safetensors.index.json"
SEAL = "ders_sha256"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A tensor that is read when asked for.

    Attributes:
        read: the whole tensor; one that lies in a file is mapped, not copied.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.empty(self.shape, dtype=self.dtype, device="meta").nbytes

    def __getitem__(self, index: int) -> "Piece":
        """One slice along the first axis."""
        return Piece(self.dtype, self.shape[1:], lambda: self.read()[index])


class TensorFolder:
    """The tensors of a Hugging Face folder by name, each a `Piece`; nothing is read before it is asked for.

    Args:
        files: the weight files, where they are known; else the folder's index or its safetensors.

    Raises:
        ModelFolderError: there is no such folder, a shard is missing, truncated or unreadable, or two hold one name.
    """

    def __init__(self, folder: Path, files: Iterable[Path] | None = None) -> None:
        self.folder = Path(folder)
        self.files = _files(self.folder) if files is None else list(files)
        self._open: dict[Path, Any] = {}
        self.seals: dict[Path, str] = {}
        self.names_in: dict[Path, list[str]] = {}
        self.pieces: dict[str, Piece] = {}
        for file in self.files:
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelFolderError(f"{file}: truncated or not safetensors: {error}") from error
            self._open[file] = opened
            self.names_in[file] = sorted(opened.keys())
            metadata = opened.metadata() or {}
            if SEAL in metadata:
                self.seals[file] = metadata[SEAL]
            for name in self.names_in[file]:
                if name in self.pieces:
                    raise ModelFolderError(f"{file}: holds {name}, which another file of the folder holds too")
                self.pieces[name] = self._piece(file, name)

    def _piece(self, file: Path, name: str) -> Piece:
        view = self._open[file].get_slice(name)
        kind = view.get_dtype()
        if kind not in _DTYPES:
            raise ModelFolderError(f"{file}: {name} is of type {kind}, which is not supported")
        return Piece(_DTYPES[kind], tuple(view.get_shape()), lambda: self._open[file].get_tensor(name))

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def config(self) -> dict[str, Any]:
        return read_config_json(self.folder)

    def content_sha256(self) -> str:
        """sha256 of all tensors by content: the same for any sharding of the same weights."""
        return combine(digests(self.pieces.values()))

    def verify(self) -> str | None:
        """Check every sealed shard against its seal; returns the sha256 of all contents, or None if a shard has none.

        Files that other tools wrote bear no seal: they were checked for completeness when they were opened.

        Raises:
            ModelFolderError: the bytes of a shard are not those that were written.
        """
        contents: list[bytes] = []
        for file, expected in self.seals.items():
            names = self.names_in[file]
            own = list(digests(self.pieces[name] for name in names))
            contents += own
            found = seal(zip(names, own, strict=True))
            if found != expected:
                raise ModelFolderError(
                    f"{file}: damaged: its contents have sha256 {found[:16]}…, and {expected[:16]}… was written. "
                    "Copy or compress it again"
                )
        return combine(contents) if len(self.seals) == len(self.files) else None


def read_config_json(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder as plain data.

    Raises:
        ModelFolderError: it is missing or not JSON.
    """
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{file}: missing or unreadable: {error}") from error
    if not isinstance(config, dict):
        raise ModelFolderError(f"{file}: is not a configuration: expected an object, found {type(config).__name__}")
    return config


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such folder. Give the path of a Hugging Face model folder")
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelFolderError(f"{folder}: holds no safetensors weights")
        return files
    try:
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelFolderError(f"{index}: unreadable: {error}") from error
    files = [folder / name for name in named]
    for file in files:
        if file.parent.resolve() != folder.resolve() or not file.is_file():
            raise ModelFolderError(f"{file}: missing, though {index.name} lists it")
    return files


def digests(pieces: Iterable[Piece]) -> Iterator[bytes]:
    """The sha256 of each piece, in order; two threads, for hashing does not hold the interpreter."""
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(lambda piece: tensor_sha256(piece.read()), pieces)


def seal(named: Iterable[tuple[str, bytes]]) -> str:
    """What a shard says of itself: sha256 over its tensors' names and digests."""
    return hashlib.sha256(b"".join(name.encode() + b"\0" + digest for name, digest in sorted(named))).hexdigest()


def copy_other_files(source: Path, target: Path) -> None:
    """Everything of a model folder but its weights and `config.json`: tokenizer, processor, licence. Never a pickle."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".index.json")
    for file in sorted(source.iterdir()):
        hidden = file.name.startswith(".") or file.name == "config.json" or file.name.endswith(weights)
        if file.is_file() and not hidden:
            shutil.copyfile(file, target / file.name)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
