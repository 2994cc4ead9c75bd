"""What identifies weights: their contents, whatever the files are called and however they are split."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_hasher(dtype: torch.dtype, shape: Iterable[int]) -> "hashlib._Hash":
    """A sha256 that knows type and shape already and wants the bytes."""
    return hashlib.sha256(f"{dtype}{tuple(shape)}".encode())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, not copied where it is contiguous."""
    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def tensor_sha256(tensor: Tensor) -> bytes:
    hasher = tensor_hasher(tensor.dtype, tensor.shape)
    hasher.update(tensor_bytes(tensor))
    return hasher.digest()


def combine(digests: Iterable[bytes]) -> str:
    """One sha256 of many tensors; order and repetition (tied weights) do not count."""
    return hashlib.sha256(b"".join(sorted(set(digests)))).hexdigest()


def content_sha256(tensors: Iterable[Tensor]) -> str:
    """sha256 of a set of tensors by their types, shapes and bytes; names, order and files do not count."""
    return combine(tensor_sha256(tensor) for tensor in tensors)
