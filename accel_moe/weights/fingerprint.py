"""Digests of a base's tensors: which tensor of a base is another one than when an adapter was trained on it.

A checkpoint of an adapter run does not hold the base. The manifest has these digests instead. A tensor's digest is that
of its dtype, its shape and its bytes. Of a tensor over `WHOLE_BYTES` four stretches are read, evenly spaced from the
first byte to the last: another training run or revision differs in nearly every value, and reading a base of hundreds
of GB at every start would cost minutes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from accel_moe.weights.base_model import BaseModel, BaseTensors
from accel_moe.weights.safetensors import HubTensor, Reader

WHOLE_BYTES = 256 * 1024
_STRETCHES, _STRETCH_BYTES = 4, 16 * 1024


def tensor_digest(tensor: HubTensor, reader: Reader) -> str:
    """A digest, 32 hexadecimal digits, of a tensor whose header was read."""
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)} ".encode(), digest_size=16)
    for first, count in _stretches(tensor.size_bytes):
        data = torch.empty(count, dtype=torch.uint8)
        reader.into(data, tensor.file, tensor.start + first)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def _stretches(size_bytes: int) -> Iterable[tuple[int, int]]:
    """(first byte, number of bytes) of the parts that are read."""
    if size_bytes <= WHOLE_BYTES:
        return [(0, size_bytes)] if size_bytes else []
    gap = (size_bytes - _STRETCH_BYTES) // (_STRETCHES - 1)
    return [(i * gap, _STRETCH_BYTES) for i in range(_STRETCHES - 1)] + [(size_bytes - _STRETCH_BYTES, _STRETCH_BYTES)]


def digests(base: BaseModel, keys: Iterable[str]) -> dict[str, str]:
    """Key → digest for those of the keys that the base has. Raises OSError, or HubFormatError as BaseTensors does."""
    tensors = BaseTensors(base)
    with Reader() as reader:
        return {key: tensor_digest(tensors.located(key), reader) for key in keys if key in base.tensors}


def first_difference(recorded: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The first tensor, by name, that is not as it was recorded: a line for an error; None if all are."""
    for key, digest in sorted(recorded.items()):
        if key not in found:
            return f"{key} is gone"
        if found[key] != digest:
            return f"{key} has the hash {found[key]}, expected {digest}"
    return None


def other_base(folder: Any, base: str | None, line: str) -> str:
    return (
        f"{folder} has an adapter of another base than {base}: {line}. Give the base that the "
        "adapter was trained on, in the state that it had then."
    )
