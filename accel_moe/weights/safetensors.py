"""Safetensors files: their headers, their bytes read into tensors, and the layout of new ones."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from accel_moe import ranks
from accel_moe.errors import HubFormatError
from accel_moe.file_ranges import read_range

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
STAGING_BYTES = 16 * 2**20
"""What one reading thread holds while it casts, or copies to a GPU."""

# safetensors' dtype names; the order is the one its writer lays tensors out in (largest alignment first)
DTYPES: dict[str, torch.dtype] = {
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class HubTensor:
    """One tensor of a safetensors file.

    Attributes:
        key: its name in the file.
        dtype: safetensors' name of its dtype ("BF16").
        shape: its shape; the values lie row-major.
        file: the file, by its name in the model's folder or by its path.
        start: the byte of the file where the values begin; -1 if no header was read: on the Hub, or planned.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int = field(default=-1, compare=False)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


# --- headers


def read_header(path: Path, file: str | None = None) -> dict[str, HubTensor]:
    """Key → tensor, from the header of a safetensors file. No tensor is read.

    Args:
        path: the file.
        file: the name that the tensors give it; the path by default.

    Raises:
        HubFormatError: it is not a safetensors file, or its header contradicts itself.
    """
    header, data = _header_of(path)
    tensors = {}
    for key, entry in header.items():
        if key.startswith("__"):
            continue
        begin, end = entry["data_offsets"]
        tensor = HubTensor(key, entry["dtype"], tuple(entry["shape"]), file or str(path), data + begin)
        if tensor.dtype in DTYPES and tensor.size_bytes != end - begin:
            raise HubFormatError(
                f"{path}: the header gives {key} {end - begin} bytes, its shape needs {tensor.size_bytes}. Download it "
                "again."
            )
        tensors[key] = tensor
    return tensors


def _header_of(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and the byte where its data starts."""
    size_bytes = path.stat().st_size
    with open(path, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= size_bytes - 8:
            raise HubFormatError(
                f"{path} is not a safetensors file: its header says {length} bytes, the file has {size_bytes}. "
                "Download it again (a Git LFS pointer looks like this too)."
            )
        try:
            return json.loads(stream.read(length)), 8 + length
        except ValueError as error:
            raise HubFormatError(f"{path} has an unreadable safetensors header ({error}). Download it again.") from None


def read_headers(files: Sequence[str]) -> dict[str, HubTensor]:
    """Key → tensor for every tensor of these files, which are to be read whole later. No tensor is read.

    Raises:
        HubFormatError: a file is missing, is shorter than its header says, or has a dtype that torch cannot hold.
    """
    tensors: dict[str, HubTensor] = {}
    for file in files:
        if not os.path.isfile(file):
            raise HubFormatError(f"{file} is missing, and the checkpoint's index names it. Download it again.")
        found = read_header(Path(file))
        for tensor in found.values():
            if tensor.dtype not in DTYPES:
                raise HubFormatError(f"{file}: {tensor.key} has dtype {tensor.dtype}, which torch cannot hold.")
        end = max((t.start + t.size_bytes for t in found.values()), default=0)
        if (size_bytes := os.path.getsize(file)) < end:
            raise HubFormatError(
                f"{file} is truncated: {size_bytes} bytes, and its header says {end}. Download it again."
            )
        tensors |= found
    return tensors


def read_hub_tensors(folder: Path) -> dict[str, HubTensor]:
    """Key → tensor for every tensor of a model folder. No tensor is read.

    Raises:
        HubFormatError: the folder has no safetensors weights, lacks a file, or has a dtype of quantised formats.
    """
    tensors: dict[str, HubTensor] = {}
    for file in safetensors_files(folder):
        if not (folder / file).is_file():
            raise HubFormatError(f"{folder / file} is missing, and {INDEX_NAME} names it. Download the base again.")
        tensors |= read_header(folder / file, file)
    refuse_unknown_dtypes(str(folder), tensors.values())
    return tensors


def safetensors_files(folder: Path) -> list[str]:
    """The safetensors files that make up a model folder, in order: the index's, or the one file."""
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise HubFormatError(f"{index} is not a readable index ({type(error).__name__}: {error}).") from None
        return sorted(set(weight_map.values()))
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    found = sorted(p.name for p in folder.iterdir())[:5] if folder.is_dir() else []
    raise HubFormatError(
        f"{folder} is not a base model: expected {INDEX_NAME} or {SINGLE_NAME} in it, found "
        f"{', '.join(found) or 'nothing'}. Give the folder of the model that training started from, in safetensors "
        "format."
    )


def refuse_unknown_dtypes(name: str, tensors: Iterable[HubTensor]) -> None:
    """Raises HubFormatError for a base with tensors of dtypes that only quantised formats use (F8_E8M0, F4, …)."""
    if unknown := sorted({tensor.dtype for tensor in tensors} - set(DTYPES)):
        raise HubFormatError(
            f"{name} has tensors of dtype {', '.join(unknown)}, expected one of {', '.join(DTYPES)}: it is quantised, "
            "and trained weights cannot be written so. Give a dequantised copy of the base."
        )


# --- bytes


class Reader:
    """Reads ranges of files into tensors through the page cache, and counts the bytes. Threads may share one.

    Args:
        total_bytes: what it will read, for a progress bar on rank 0; 0 shows none.
        folder: where files that are named without a path lie.
    """

    def __init__(self, total_bytes: int = 0, folder: str | os.PathLike = ""):
        self.read_bytes = 0
        self._folder = folder
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        self._staging = threading.local()
        self._bar = _progress_bar(total_bytes) if total_bytes else None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        if self._bar is not None:
            self._bar.close()

    def into(self, tensor: torch.Tensor, file: str, start: int) -> None:
        """Fill a contiguous CPU tensor with the bytes from `start` on. Raises OSError where the file ends too early."""
        memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        done = read_range(self._descriptor(file), memory, start)
        if done < len(memory):
            raise OSError(f"{file} ended at byte {start + done}, and {len(memory) - done} more were expected.")
        with self._lock:
            self.read_bytes += done
            if self._bar is not None:
                self._bar.update(done)

    def tensor(self, source: HubTensor, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor of a file, whole or (first, count) of its rows, on the CPU, as stored."""
        assert source.start >= 0, source
        shape, start = source.shape, source.start
        if rows is not None:
            start += rows[0] * (source.size_bytes // shape[0])
            shape = (rows[1], *shape[1:])
        tensor = torch.empty(shape, dtype=source.torch_dtype)
        if tensor.numel():
            self.into(tensor, source.file, start)
        return tensor

    def will_need(self, file: str, start: int, size_bytes: int) -> None:
        """Ask the kernel to fetch a range that is read later."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor(file), start, size_bytes, os.POSIX_FADV_WILLNEED)

    def staging(self, device: torch.device) -> torch.Tensor:
        """[STAGING_BYTES] uint8 of this thread's own; pinned where a GPU will fetch from it."""
        if not hasattr(self._staging, "memory"):
            self._staging.memory = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
        return self._staging.memory

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(os.path.join(self._folder, file), os.O_RDONLY)
            return self._open[file]


def _progress_bar(total_bytes: int) -> Any:
    from transformers.utils import logging as transformers_logging

    if not ranks.is_rank0() or not transformers_logging.is_progress_bar_enabled():
        return None
    from tqdm.auto import tqdm

    return tqdm(total=total_bytes, desc="Weights into the shards (rank 0)", unit="B", unit_scale=True, mininterval=0.5)


# --- new files


def shard_names(tensors: Sequence[tuple[str, int]], max_shard_bytes: int) -> dict[str, str]:
    """Key → file for (key, size_bytes) in order: a new file begins where the next tensor would not fit."""
    shards: list[list[str]] = []
    filled = 0
    for key, size_bytes in tensors:
        if not shards or (filled and filled + size_bytes > max_shard_bytes):
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size_bytes
    if len(shards) <= 1:
        return {key: SINGLE_NAME for shard in shards for key in shard}
    total = len(shards)
    return {key: f"model-{i:05d}-of-{total:05d}.safetensors" for i, shard in enumerate(shards, 1) for key in shard}


def header_bytes(tensors: Sequence[HubTensor]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file that holds `tensors`, and each tensor's absolute offset in that file.

    The layout is the one safetensors' own writer chooses: by alignment, largest first, then by key.
    """
    order = list(DTYPES)
    laid_out = sorted(tensors, key=lambda t: (-t.torch_dtype.itemsize, order.index(t.dtype), t.key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for tensor in laid_out:
        offsets[tensor.key] = position
        header[tensor.key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size_bytes],
        }
        position += tensor.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    prefix = struct.pack("<Q", len(text)) + text
    return prefix, {key: offset + len(prefix) for key, offset in offsets.items()}


def parse_size(text: str) -> int:
    """ "5GB" → 5_000_000_000, "300MiB" → 314_572_800; a plain number is bytes. Raises HubFormatError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise HubFormatError(f"{text!r} is not a size. Write it like 5GB, 300MB or 2GiB.")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
