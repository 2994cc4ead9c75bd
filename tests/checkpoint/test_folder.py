import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ders.checkpoint import FolderWriter, ModelFolderError, Slot, TensorFolder, content_sha256, new_folder, writer

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randint(9, (7,), dtype=torch.uint8),
    "c.d": torch.randn(4, 3).bfloat16(),
    "e": torch.tensor([1, 2]),
    "empty": torch.empty(0, 4),
}


def written(folder: Path, shard_bytes: int = 10**9) -> str:
    slots = [Slot(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    with new_folder(folder) as unfinished, FolderWriter(unfinished, slots, shard_bytes=shard_bytes) as output:
        for name in ("b", "c.d", "empty"):
            output.write(name, TENSORS[name])
        for row in TENSORS["a"]:  # in parts, and out of order
            output.write("a", row)
        output.write("e", TENSORS["e"])
        return output.close()


@pytest.mark.parametrize("shard_bytes", [10**9, 50, 1])
def test_what_was_written_is_read(tmp_path: Path, shard_bytes: int) -> None:
    sha256 = written(tmp_path / "x", shard_bytes)
    folder = TensorFolder(tmp_path / "x")
    assert set(folder.pieces) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert folder.pieces[name].shape == tensor.shape
        assert folder.pieces[name].num_bytes == tensor.nbytes
        assert torch.equal(folder.pieces[name].read(), tensor)
    assert len(folder.seals) == len(folder.files)
    assert sha256 == folder.verify() == folder.content_sha256() == content_sha256(TENSORS.values())


def test_the_library_reads_it_too(tmp_path: Path) -> None:
    written(tmp_path / "x")
    loaded = load_file(tmp_path / "x" / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_wide_types_start_at_multiples_of_their_size(tmp_path: Path) -> None:
    written(tmp_path / "x")
    data = (tmp_path / "x" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.element_size() == 0 for name, tensor in TENSORS.items())


def test_content_does_not_depend_on_sharding_names_or_repetition(tmp_path: Path) -> None:
    first, second = written(tmp_path / "x"), written(tmp_path / "y", 1)
    renamed = content_sha256([*TENSORS.values(), TENSORS["a"]])
    assert first == second == renamed
    assert first != content_sha256([*TENSORS.values(), torch.ones(1)])
    assert content_sha256([torch.zeros(2)]) != content_sha256([torch.zeros(2, 1)])


def test_one_slice_of_a_stack(tmp_path: Path) -> None:
    written(tmp_path / "x")
    piece = TensorFolder(tmp_path / "x").pieces["a"][1]
    assert piece.shape == (5,)
    assert torch.equal(piece.read(), TENSORS["a"][1])


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "model-00002-of-00005.safetensors", -1), "model-00002-of-00005.safetensors: damaged"),
        (lambda f: (f / "model-00003-of-00005.safetensors").unlink(), "model-00003-of-00005.safetensors: missing"),
        (
            lambda f: (f / "model-00001-of-00005.safetensors").write_bytes(
                (f / "model-00001-of-00005.safetensors").read_bytes()[:-1]
            ),
            "model-00001-of-00005.safetensors: truncated or not safetensors",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json: unreadable"),
        (lambda f: [file.unlink() for file in f.iterdir()], "holds no safetensors weights"),
    ],
)
def test_damage_is_told_with_the_file(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    written(tmp_path / "x", 1)
    damage(tmp_path / "x")
    with pytest.raises(ModelFolderError, match=message):
        TensorFolder(tmp_path / "x").verify()


def test_every_flipped_byte_of_a_shard_is_noticed(tmp_path: Path) -> None:
    """In the header too: lengths, names, types, places, and the seal itself."""
    written(tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    text = whole[8 : 8 + length].decode()
    # Spaces that fill the header up, and the word transformers writes, say nothing about a tensor.
    ignored = {*range(8 + len(text.rstrip()), 8 + length)} | {*range(8, 8 + text.index('"ders_sha256"'))}
    for place in range(len(whole)):
        if place in ignored:
            continue
        flip(file, place)
        try:
            seals = TensorFolder(tmp_path / "x").verify()
        except ModelFolderError:
            seals = None
        assert not seals, f"byte {place}"  # the seal's own name is damaged: as other tools write it
        file.write_bytes(whole)


def test_files_of_other_tools_have_no_seal(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert TensorFolder(tmp_path).verify() is None


def test_two_files_with_one_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelFolderError, match=r"two.safetensors: holds a, which another file"):
        TensorFolder(tmp_path)


def test_an_index_cannot_point_outside(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../secret.safetensors"}})
    )
    with pytest.raises(ModelFolderError, match="missing, though"):
        TensorFolder(tmp_path / "x")


def test_a_tensor_that_was_declared_and_not_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="1 tensors were declared and not written, among them a"),
        new_folder(tmp_path / "x") as unfinished,
        FolderWriter(unfinished, [Slot("a", torch.float32, (2,))]) as output,
    ):
        output.close()
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_does_not_fit(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="does not fit the declared"),
        new_folder(tmp_path / "x") as unfinished,
        FolderWriter(unfinished, [Slot("a", torch.float32, (2,))]) as output,
    ):
        output.write("a", torch.zeros(3))


def test_no_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    slots = [Slot(f"a{i}", torch.float32, (2**40,)) for i in range(100)]
    with (
        pytest.raises(ModelFolderError, match=r"MB are to be written and .* MB are free"),
        new_folder(tmp_path / "x") as unfinished,
    ):
        FolderWriter(unfinished, slots)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_put", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
