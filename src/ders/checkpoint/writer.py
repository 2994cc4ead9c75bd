"""Writing safetensors tensor by tensor, whatever the model's size.

The format (github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header, then the
bytes of all tensors without a gap.
"""

import json
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ders.checkpoint.errors import ModelFolderError
from ders.checkpoint.folder import INDEX, NAMES, SEAL, seal
from ders.checkpoint.hashing import combine, tensor_bytes, tensor_hasher

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Slot:
    """A tensor to be written: its place is kept before its bytes are known."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.empty(self.shape, dtype=self.dtype, device="meta").nbytes


@dataclass
class _Place:
    file: BinaryIO
    offset: int
    slot: Slot
    hasher: Any
    written: int = 0


@dataclass
class _Shard:
    slots: list[Slot] = field(default_factory=list)
    num_bytes: int = 0


class FolderWriter:
    """Writes the weights of a Hugging Face folder: shards, their seals and the index.

    All slots are declared at first, so that every byte has its place; contents then come in any order, in parts where
    a tensor is large.

    Args:
        folder: exists and is empty of weights (`new_folder`).
        slots: everything that will be written.
        shard_bytes: a shard ends before it would exceed this.

    Raises:
        ModelFolderError: the disk has no room for it.
    """

    def __init__(self, folder: Path, slots: Iterable[Slot], *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        shards = _split(slots, shard_bytes)
        self.total_bytes = sum(shard.num_bytes for shard in shards)
        _require_space(folder, self.total_bytes)
        self._pool = ThreadPoolExecutor(2)
        self._under_way: list[Future[None]] = []
        self._places: dict[str, _Place] = {}
        self._files: list[tuple[BinaryIO, int, list[str]]] = []
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            self._start(folder / name, shard.slots)

    def _start(self, path: Path, slots: list[Slot]) -> None:
        # Wide types first: every tensor then starts at a multiple of its element size.
        ordered = sorted(slots, key=lambda slot: (-slot.dtype.itemsize, slot.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", SEAL: "0" * 64}}
        offset = 0
        for slot in ordered:
            end = offset + slot.num_bytes
            header[slot.name] = {"dtype": NAMES[slot.dtype], "shape": slot.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("w+b", buffering=0)
        file.write(len(text).to_bytes(8, "little") + text)
        for slot in ordered:
            start = 8 + len(text) + header[slot.name]["data_offsets"][0]
            self._places[slot.name] = _Place(file, start, slot, tensor_hasher(slot.dtype, slot.shape))
        self._files.append((file, 8 + text.index(b"0" * 64), [slot.name for slot in ordered]))

    def write(self, name: str, tensor: Tensor) -> None:
        """The next part of a tensor, or all of it; it must not be changed until the next call has returned."""
        place = self._places[name]
        self._wait()
        data = tensor_bytes(tensor.to("cpu"))
        if tensor.dtype != place.slot.dtype or place.written + len(data) > place.slot.num_bytes:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} does not fit the declared {place.slot}")
        start = place.offset + place.written
        place.written += len(data)
        # Hashing and writing need no interpreter: they run while the next tensor is made.
        self._under_way = [
            self._pool.submit(_put, place.file, start, data),
            self._pool.submit(place.hasher.update, data),
        ]

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, []
        for work in under_way:
            work.result()

    def close(self) -> str:
        """Seal every shard and write the index; returns the sha256 of the contents.

        Raises:
            ValueError: a declared tensor was not written whole.
        """
        self._wait()
        incomplete = [name for name, place in self._places.items() if place.written != place.slot.num_bytes]
        if incomplete:
            raise ValueError(f"{len(incomplete)} tensors were declared and not written, among them {incomplete[0]}")
        digests = {name: place.hasher.digest() for name, place in self._places.items()}
        for file, where, names in self._files:
            file.seek(where)
            file.write(seal((name, digests[name]) for name in names).encode())
            file.close()
        if len(self._files) > 1:
            weight_map = {name: Path(file.name).name for file, _, names in self._files for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return combine(digests.values())

    def abandon(self) -> None:
        """Close the files as they are; whoever made the folder removes it."""
        self._pool.shutdown()
        for file, _, _ in self._files:
            file.close()

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()


def _put(file: BinaryIO, start: int, data: memoryview) -> None:
    file.seek(start)
    while data:  # one call writes 2 GB at most
        data = data[file.write(data) :]


def _split(slots: Iterable[Slot], shard_bytes: int) -> list[_Shard]:
    shards = [_Shard()]
    for slot in slots:
        if shards[-1].slots and shards[-1].num_bytes + slot.num_bytes > shard_bytes:
            shards.append(_Shard())
        shards[-1].slots.append(slot)
        shards[-1].num_bytes += slot.num_bytes
    return shards


def _require_space(folder: Path, needed: int) -> None:
    free = os.statvfs(folder)
    available = free.f_bavail * free.f_frsize
    if available < needed:
        raise ModelFolderError(
            f"{folder.parent}: {needed / 1e6:,.1f} MB are to be written and {available / 1e6:,.1f} MB are free. "
            "Make room, or choose an output on another disk"
        )
