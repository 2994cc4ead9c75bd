"""The bytes of a model's files, exactly, before there is a model: from its shapes on the meta device.

The files are those of `save_pretrained` (as `save_bundle` calls it) and of `compress_folder`; the index beside several
files is JSON and does not count, as in `stored_bytes`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ders.checkpoint import Piece, TensorFolder
from ders.checkpoint.header import Slot, file_bytes, folder_bytes
from ders.compression.compress import compressed_form, section_of
from ders.compression.own import read_own
from ders.compression.streaming import compressed_slots, delta_shapes
from ders.deltas import Delta

# Where `save_pretrained` starts another file.
_SHARD_SIZE = "50GB"


def planned_files(model: nn.Module) -> dict[str, list[Slot]]:
    """The files that `model.save_pretrained` would write, and the tensors in each, under the names it gives them.

    Args:
        model: of transformers, dense or upcycled, on any device, in the type it would be saved in.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name in getattr(model, "_keys_to_ignore_on_save", None) or []:
        state.pop(name, None)
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    files = split_torch_state_dict_into_shards(state, max_shard_size=_SHARD_SIZE).filename_to_tensors
    return {
        file: [Slot(name, state[name].dtype, tuple(state[name].shape)) for name in names]
        for file, names in files.items()
    }


def planned_bytes(model: nn.Module) -> int:
    """Bytes of the weight files that `model.save_pretrained` would write, headers included."""
    return sum(file_bytes(slots) for slots in planned_files(model).values())


def planned_compressed_bytes(model: nn.Module, *, delta: Callable[..., Delta], extended: bool = False) -> int:
    """Bytes of the weight files that `compress_folder` would write for a vanilla MoE saved by `save_pretrained`.

    Args:
        model: upcycled with full experts.
        delta, extended: as for `compress_folder`.

    Raises:
        ValueError: the model is not such a one, or a dial does not fit.
    """
    source = read_own(_PlannedFolder(model))
    upcycling = compressed_form(source.upcycling, delta, extended)
    return folder_bytes(compressed_slots(source, upcycling, delta_shapes(source, upcycling)))


class _PlannedFolder(TensorFolder):
    """A folder as `save_pretrained` would write it: names, types and shapes that cannot be read."""

    def __init__(self, model: nn.Module) -> None:
        self.folder = Path(type(model).__name__)
        self._config: dict[str, Any] = model.config.to_dict() | {"quantization_config": section_of(model)}
        self.pieces = {
            slot.name: Piece(slot.dtype, slot.shape, _unreadable)
            for _, slots in sorted(planned_files(model).items())
            for slot in sorted(slots, key=lambda slot: slot.name)
        }

    def config(self) -> dict[str, Any]:
        return dict(self._config)


def _unreadable() -> Tensor:
    raise RuntimeError("a planned tensor has no values")
