"""The files of an adapter: what it is and over which parent (`adapter_config.json`), its weights in one sealed file."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ders.checkpoint.atomic import new_folder
from ders.checkpoint.errors import ModelFolderError
from ders.checkpoint.folder import Piece, TensorFolder
from ders.checkpoint.hashing import content_sha256
from ders.checkpoint.writer import FolderWriter, Slot

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
FORMAT_VERSION = 1
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class ParentIdentity:
    """Which dense model an adapter belongs to.

    Attributes:
        id, revision: where it came from, for the reader; nothing acts on them.
        sha256: of its tensors by content, held in `dtype`.
        dtype: a key of `FLOATS`.
    """

    id: str
    revision: str | None
    sha256: str
    dtype: str

    def __str__(self) -> str:
        revision = f" at revision {self.revision}" if self.revision else ""
        return f"{self.id or 'a model without a name'}{revision} (sha256 {self.sha256[:16]}…, {self.dtype})"


@dataclass(frozen=True)
class AdapterConfig:
    """`adapter_config.json` as plain data.

    Attributes:
        upcycling: the `ders` section of the whole model (`Upcycling.to_section`).
        base_change: how changed matrices of the shared base are held: "exact", or class name and dials of a delta over
            the parent's; None where none changed.
        changed: names of the parent's FFN weights that this adapter has its own of: shared base, universal FFN.
    """

    upcycling: dict[str, Any]
    parent: ParentIdentity
    base_change: str | dict[str, Any] | None = None
    changed: list[str] = field(default_factory=list)


def parent_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The type to hash a parent in: the half-precision type that holds all its values exactly, else its narrowest one.

    So a bf16 model that was loaded in fp32 is still that bf16 model.
    """
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    for dtype in (torch.bfloat16, torch.float16):
        if all(_holds(dtype, tensor) for tensor in floats):
            return dtype
    return min((tensor.dtype for tensor in floats), key=lambda dtype: dtype.itemsize)


def parent_sha256(tensors: Iterable[Tensor], dtype: torch.dtype) -> str:
    """`content_sha256` with every floating tensor in `dtype` that loses nothing by it; the others as they are."""
    return content_sha256(
        (tensor.to(dtype) if tensor.is_floating_point() and _holds(dtype, tensor) else tensor).cpu()
        for tensor in tensors
    )


def _holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    if torch.promote_types(dtype, tensor.dtype) != tensor.dtype:
        return False
    return dtype == tensor.dtype or torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def write_adapter(folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], *, overwrite: bool) -> None:
    """Write a whole adapter folder; it appears complete or not at all.

    Raises:
        ModelFolderError: the folder exists (without `overwrite`), or the disk has no room for it.
    """
    slots = [Slot(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with new_folder(folder, overwrite=overwrite) as unfinished:
        # One file however large: an adapter that needs shards is a model.
        with FolderWriter(unfinished, slots, shard_bytes=2**62) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.close()
        (unfinished / "model.safetensors").rename(unfinished / WEIGHTS)
        plain = {"format_version": FORMAT_VERSION, **asdict(config)}
        (unfinished / CONFIG).write_text(json.dumps(plain, indent=2) + "\n")


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Piece]]:
    """What an adapter folder says of itself, and its tensors by name, checked against their seal.

    Raises:
        ModelFolderError: not an adapter, of an unknown format, or damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ModelFolderError(f"{folder / CONFIG}: no such file. Give the path of a folder that save_adapter wrote")
    config = _read_config(folder / CONFIG)
    tensors = TensorFolder(folder, [folder / WEIGHTS])
    if not tensors.verify():
        raise ModelFolderError(f"{folder / WEIGHTS}: bears no seal: save_adapter did not write it as it is now")
    return config, tensors.pieces


def _read_config(file: Path) -> AdapterConfig:
    try:
        plain = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelFolderError(f"{file}: unreadable: {error}") from error
    version = plain.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ModelFolderError(
            f"{file}: format_version {version!r} is not known to this ders (it reads {FORMAT_VERSION}). Update ders, "
            "or save the adapter again with this version"
        )
    try:
        config = AdapterConfig(**{**plain, "parent": ParentIdentity(**plain["parent"])})
    except (TypeError, KeyError) as error:
        raise ModelFolderError(f"{file}: damaged: {error}") from error
    if config.parent.dtype not in FLOATS:
        raise ModelFolderError(f"{file}: damaged: the parent's dtype must be one of {', '.join(FLOATS)}")
    described = config.base_change in (None, "exact") or isinstance(config.base_change, dict)
    if not (isinstance(config.upcycling, dict) and isinstance(config.changed, list) and described):
        raise ModelFolderError(f"{file}: damaged: upcycling, base_change or changed is not of its type")
    return config
