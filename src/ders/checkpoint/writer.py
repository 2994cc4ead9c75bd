"""Writing safetensors tensor by tensor, whatever the model's size."""

import json
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ders.checkpoint.errors import ModelFolderError
from ders.checkpoint.folder import INDEX, seal
from ders.checkpoint.hashing import combine, tensor_bytes, tensor_hasher
from ders.checkpoint.header import SHARD_BYTES, UNSEALED, Slot, sealed_header, split


@dataclass
class _Place:
    file: BinaryIO
    offset: int
    slot: Slot
    hasher: Any
    written: int = 0


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
        shards = split(slots, shard_bytes)
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
        header = sealed_header(slots)
        by_name = {slot.name: slot for slot in slots}
        file = path.open("w+b", buffering=0)
        file.write(header.data)
        for name, start in header.offsets.items():
            slot = by_name[name]
            self._places[name] = _Place(file, start, slot, tensor_hasher(slot.dtype, slot.shape))
        self._files.append((file, header.data.index(UNSEALED.encode()), list(header.offsets)))

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


def _require_space(folder: Path, needed: int) -> None:
    free = os.statvfs(folder)
    available = free.f_bavail * free.f_frsize
    if available < needed:
        raise ModelFolderError(
            f"{folder.parent}: {needed / 1e6:,.1f} MB are to be written and {available / 1e6:,.1f} MB are free. "
            "Make room, or choose an output on another disk"
        )
