"""Parts of files into tensors, with plain reads through the page cache, from several threads, with a progress bar."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from accel_moe import ranks
from accel_moe.weights.hub_loading import StoredTensor

STAGING_BYTES = 16 * 2**20
"""What one reading thread holds while it casts, or copies to a GPU."""


class Reader:
    """Reads parts of files into tensors, counts the bytes, and shows progress. Safe to use from several threads."""

    def __init__(self, total_bytes: int = 0):
        self.read_bytes = 0
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
        """Fill a contiguous CPU tensor with the bytes from `start` on."""
        memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        descriptor = self._descriptor(file)
        done = 0
        while done < len(memory):
            count = _read_at(descriptor, memory[done:], start + done)
            if count <= 0:
                raise OSError(f"{file} ended at byte {start + done}, and {len(memory) - done} more were expected.")
            done += count
        with self._lock:
            self.read_bytes += done
            if self._bar is not None:
                self._bar.update(done)

    def will_need(self, file: str, start: int, size_bytes: int) -> None:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor(file), start, size_bytes, os.POSIX_FADV_WILLNEED)

    def tensor(self, source: StoredTensor, rows: tuple[int, int] | None) -> torch.Tensor:
        """A stored tensor, whole or (first, count) of its rows, on the CPU, as stored."""
        shape, start = source.shape, source.start
        if rows is not None:
            start += rows[0] * (source.size_bytes // shape[0])
            shape = (rows[1], *shape[1:])
        tensor = torch.empty(shape, dtype=source.dtype)
        if tensor.numel():
            self.into(tensor, source.file, start)
        return tensor

    def staging(self, device: torch.device) -> torch.Tensor:
        """[STAGING_BYTES] uint8 of this thread's own; pinned where a GPU will fetch from it."""
        if not hasattr(self._staging, "memory"):
            self._staging.memory = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
        return self._staging.memory

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY)
            return self._open[file]


def _read_at(descriptor: int, memory: memoryview, start: int) -> int:
    """As os.preadv, which macOS's Python may lack. The number of bytes read."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [memory], start)
    data = os.pread(descriptor, min(len(memory), STAGING_BYTES), start)
    memory[: len(data)] = data
    return len(data)


def _progress_bar(total_bytes: int) -> Any:
    from transformers.utils import logging as transformers_logging

    if not ranks.is_rank0() or not transformers_logging.is_progress_bar_enabled():
        return None
    from tqdm.auto import tqdm

    return tqdm(total=total_bytes, desc="Weights into the shards (rank 0)", unit="B", unit_scale=True, mininterval=0.5)
