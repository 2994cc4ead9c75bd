"""How safetensors lie in a file, known before a byte of them is.

The format (github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header, then the
bytes of all tensors without a gap.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ders.checkpoint.folder import NAMES, SEAL

SHARD_BYTES = 5 * 10**9
UNSEALED = "0" * 64
# safetensors' own order, wide types first: every tensor then starts at a multiple of its element size.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")


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
class Shard:
    """The tensors of one file."""

    slots: list[Slot] = field(default_factory=list)
    num_bytes: int = 0


@dataclass(frozen=True)
class Header:
    """What stands before the tensors of a file.

    Attributes:
        data: the first bytes of the file, the header's length among them.
        offsets: where each tensor starts in the file, by name, in order.
    """

    data: bytes
    offsets: dict[str, int]


def split(slots: Iterable[Slot], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Slots to files, in order; a file ends before it would exceed `shard_bytes`."""
    shards = [Shard()]
    for slot in slots:
        if shards[-1].slots and shards[-1].num_bytes + slot.num_bytes > shard_bytes:
            shards.append(Shard())
        shards[-1].slots.append(slot)
        shards[-1].num_bytes += slot.num_bytes
    return shards


def header(slots: Iterable[Slot], metadata: Mapping[str, str]) -> Header:
    """The header of a file of these slots, as the safetensors library itself would write it."""
    ordered = sorted(slots, key=lambda slot: (_ORDER.index(NAMES[slot.dtype]), slot.name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    starts = {}
    for slot in ordered:
        starts[slot.name], end = end, end + slot.num_bytes
        span = [starts[slot.name], end]
        entries[slot.name] = {"dtype": NAMES[slot.dtype], "shape": slot.shape, "data_offsets": span}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text
    return Header(data, {name: len(data) + start for name, start in starts.items()})


def sealed_header(slots: Iterable[Slot]) -> Header:
    """The header of one of our own shards, its seal still `UNSEALED`."""
    return header(slots, {"format": "pt", SEAL: UNSEALED})


def file_bytes(slots: Iterable[Slot]) -> int:
    """Bytes of a file that the safetensors library writes, as `save_pretrained` asks it to."""
    slots = list(slots)
    return len(header(slots, {"format": "pt"}).data) + sum(slot.num_bytes for slot in slots)


def folder_bytes(slots: Iterable[Slot], shard_bytes: int = SHARD_BYTES) -> int:
    """Bytes of the files that `FolderWriter` writes for these slots; the index is JSON and does not count."""
    return sum(len(sealed_header(shard.slots).data) + shard.num_bytes for shard in split(slots, shard_bytes))
