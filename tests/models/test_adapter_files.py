"""Adapter folders that are not what save_adapter wrote: refused, naming the file, and the model stays as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import logits, trained
from safetensors.torch import load_file, save_file
from torch import Tensor

from ders.checkpoint import FolderWriter, ModelFolderError, Slot
from ders.models.adapters import load_adapter, save_adapter
from ders.upcycling.adapters import adapters

FIRST = "layers.0.mlp"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change an adapter's tensors and seal it again."""
    file = folder / "adapter.safetensors"
    tensors = load_file(file)
    change(tensors)
    with FolderWriter(folder, [Slot(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()
    (folder / "model.safetensors").rename(file)


def flip(folder: Path) -> None:
    file = folder / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_section(folder: Path, **changes: Any) -> None:
    section = json.loads((folder / "adapter_config.json").read_text())["upcycling"]
    edit(folder, upcycling=section | changes)


VALUES = f"{FIRST}.experts.deltas.up_proj.values_EN"
WEIGHTS = r"a/adapter\.safetensors: "
CONFIG = r"a/adapter_config\.json: "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, WEIGHTS + "damaged"),
        (
            lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:-9]),
            WEIGHTS + "truncated",
        ),
        (lambda f: (f / "adapter.safetensors").unlink(), WEIGHTS),
        (lambda f: save_file(load_file(f / "adapter.safetensors"), f / "adapter.safetensors"), WEIGHTS + "bears no"),
        (lambda f: rewrite(f, lambda t: t.pop(VALUES)), f"{WEIGHTS}lacks {VALUES}"),
        (lambda f: rewrite(f, lambda t: t.update({VALUES + "x": t[VALUES]})), f"{WEIGHTS}holds 1 .*{VALUES}x"),
        (lambda f: rewrite(f, lambda t: t.update({"other": t[VALUES]})), f"{WEIGHTS}holds 1 .* other"),
        (lambda f: rewrite(f, lambda t: t.update({VALUES: t[VALUES][1:]})), f"{WEIGHTS}{FIRST} is not what"),
        (lambda f: edit(f, changed=[f"{FIRST}.up_proj.weight"]), f"{WEIGHTS}lacks {FIRST}.up_proj.weight"),
        (lambda f: edit(f, changed=["elsewhere"]), f"{WEIGHTS}holds 1 .* elsewhere"),
        (lambda f: edit(f, format_version=2), CONFIG + "format_version 2 is not known"),
        (lambda f: edit(f, more=1), CONFIG + "damaged"),
        (lambda f: edit(f, changed=None), CONFIG + "damaged"),
        (lambda f: edit(f, base_change={"name": "os.system"}), f"{WEIGHTS}{FIRST} is not .*unknown delta"),
        (lambda f: edit(f, parent={"id": "x"}), CONFIG + "damaged"),
        (lambda f: edit_section(f, delta={"name": "os.system"}), CONFIG + "unknown delta"),
        (lambda f: edit_section(f, delta=None), CONFIG + "the experts of this model are full"),
        (lambda f: edit_section(f, layers=[0, 99]), CONFIG + r"layers \[99\] are not among the 4"),
        (lambda f: (f / "adapter_config.json").write_text("{"), CONFIG + "unreadable"),
        (lambda f: (f / "adapter_config.json").unlink(), CONFIG + "no such file"),
    ],
)
def test_damaged_adapters_are_refused(
    damage: Callable[[Path], Any], message: str, dense_model: Callable[..., Any], tmp_path: Path
) -> None:
    dense = dense_model()
    plain = logits(dense)
    save_adapter(trained(dense), tmp_path / "a", parent=dense)
    damage(tmp_path / "a")
    with pytest.raises(ModelFolderError, match=message):
        load_adapter(dense, tmp_path / "a")
    assert adapters(dense) == []
    assert torch.equal(logits(dense), plain)
