"""torch.distributed.checkpoint (DCP) with checksums: a writer that knows the size and checksum of each file it wrote.

The layout is DCP's own (`.metadata` and `__<rank>_<n>.distcp`), so stock accelerate and torch read it.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.storage import WriteResult

from accel_moe.checkpoint.checksums import ALGORITHM, StreamDigest
from accel_moe.checkpoint.dcp_metadata import MANIFEST_MARK
from accel_moe.checkpoint.durable import fsync
from accel_moe.checkpoint.manifest import FileEntry

COPY_AHEAD_BYTES = 10_000_000  # DCP's default: what is copied from the GPU ahead of the writing


class _ChecksumStream(io.RawIOBase):
    """A write-only stream that feeds a file and its checksum."""

    def __init__(self, raw: Any, digest: StreamDigest) -> None:
        self._raw, self._digest = raw, digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._digest.update(data, overlap=lambda: self._raw.write(data))

    def tell(self) -> int:
        return self._digest.size_bytes  # the stream is only appended to

    def flush(self) -> None:
        self._raw.flush()

    def fileno(self) -> int:
        return self._raw.fileno()


class _ChecksumFileSystem(FileSystem):
    """DCP's file system; every file opened for writing leaves its size and checksum in `written`."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.written: dict[str, FileEntry] = {}
        self._pool = pool

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as raw:
            if mode != "wb":
                yield raw
                return
            digest = StreamDigest(ALGORITHM, self._pool)
            yield _ChecksumStream(raw, digest)
            raw.flush()
            fsync(raw.fileno())
            self.written[str(path)] = FileEntry(digest.size_bytes, digest.hexdigest())

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        if str(path) in self.written:
            self.written[str(new_path)] = self.written.pop(str(path))


class ChecksumWriter(FileSystemWriter):
    """FileSystemWriter whose `file_entries()` says what this rank wrote: {file name: FileEntry}.

    Files are fsynced before DCP's write step ends. `pool`'s threads compute the checksum from the bytes on their way to
    the disk. The file is not read back, so the checksum is that of the bytes the program meant to write.

    Ranks that write to one disk have one leader in `leaders`. With several disks the coordinator's `node_metadata` has
    the `.metadata` for each other disk, by leader. It differs only in the files of values that each node copied.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        pool: ThreadPoolExecutor,
        leaders: Sequence[int] = (0,),
        copy_ahead_bytes: int = COPY_AHEAD_BYTES,
    ) -> None:
        # DCP's own fsync fails the save where the file system has none: the file system above does it
        super().__init__(path, sync_files=False, overwrite=False, per_thread_copy_ahead=copy_ahead_bytes)
        self.fs = _ChecksumFileSystem(pool)
        self._leaders = leaders
        self.node_metadata: dict[int, bytes] = {}

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        first = self._leaders[0]
        results_of_rank0s_disk = self._own_last(first, results)
        super().finish(metadata, results_of_rank0s_disk)
        # torch 2.11 fills in a copy, and dist_cp.save returns this one
        metadata.storage_data = {
            written.index: written.storage_data for some in results_of_rank0s_disk for written in some
        }
        metadata.storage_meta = self.storage_meta()
        for leader in set(self._leaders) - {first}:
            own_last = self._own_last(leader, results)
            storage = {written.index: written.storage_data for some in own_last for written in some}
            self.node_metadata[leader] = pickle.dumps(dataclasses.replace(metadata, storage_data=storage))

    def _own_last(self, leader: int, results: list[list[WriteResult]]) -> list[list[WriteResult]]:
        """Of two results for one value DCP takes the later one, so this disk's ranks come last."""
        if len(set(self._leaders)) == 1:
            return results
        return [results[r] for r in sorted(range(len(results)), key=lambda r: self._leaders[r] == leader)]

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id, modules=[MANIFEST_MARK])

    def file_entries(self) -> dict[str, FileEntry]:
        return {Path(path).name: entry for path, entry in self.fs.written.items()}
