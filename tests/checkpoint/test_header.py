"""Headers against those that the safetensors library writes."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from ders.checkpoint import Slot
from ders.checkpoint.folder import NAMES
from ders.checkpoint.header import file_bytes, header


def test_the_header_is_the_librarys_own(tmp_path: Path) -> None:
    """Every type that is known, names that sort by case and sign, a scalar and an empty tensor."""
    tensors = {f"layer.{i}": torch.zeros(3, 5).to(dtype) for i, dtype in enumerate(NAMES)}
    tensors |= {"a.b": torch.zeros(()), "a.B": torch.zeros(0, 3), "a-b": torch.zeros(7, dtype=torch.uint8)}
    tensors |= {"größe": torch.zeros(2, dtype=torch.int64)}
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    written = (tmp_path / "file").read_bytes()
    slots = [Slot(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    planned = header(slots, {"format": "pt"})
    assert written[: len(planned.data)] == planned.data
    assert file_bytes(slots) == len(written)


def test_offsets_lead_to_the_values(tmp_path: Path) -> None:
    tensors = {"x": torch.tensor([5, 6], dtype=torch.int32), "y": torch.tensor([7], dtype=torch.uint8)}
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    written = (tmp_path / "file").read_bytes()
    slots = [Slot(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    offsets = header(slots, {"format": "pt"}).offsets
    assert [written[offsets["x"]], written[offsets["x"] + 4], written[offsets["y"]]] == [5, 6, 7]
