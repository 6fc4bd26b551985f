"""torch.distributed.checkpoint (DCP) with what it leaves out: checksums, a check of the chunks, bounded
reading.

Three things live here:

    ChecksumWriter     a FileSystemWriter that knows the size and checksum of every file it wrote
    FolderReader       a FileSystemReader over one DCP folder that may be spread over several disks
    TensorReader       reads whole tensors one at a time, in one process, without a process group

The layout is DCP's own (`.metadata` and `__<rank>_<n>.distcp`), so stock accelerate and torch read what is
written here. `.metadata` is a pickle of which only descriptions of tensors are read (dcp_metadata.py). The byte entries
of an optimizer are pickles that DCP reads whole: resume only from where you would run code.

A checkpoint keeps the model under "model.<parameter>" in `pytorch_model_fsdp_<i>`, the optimizer under
"optimizer.*" in `optimizer_<i>`: accelerate's names.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from accel_moe.checkpoint.dcp_metadata import read_metadata
from accel_moe.checkpoint.durable import fsync
from accel_moe.checkpoint.manifest import (
    Chunk,
    FileEntry,
    Manifest,
    StreamDigest,
    TensorEntry,
    check_chunks,
    known_paths,
    writer_of,
)
from accel_moe.errors import CheckpointError
from accel_moe.names import plain_name

METADATA_NAME = ".metadata"
MODEL_FOLDER = "pytorch_model_fsdp"
OPTIMIZER_FOLDER = "optimizer"
MODEL_PREFIX = "model."
COPY_AHEAD_BYTES = 10_000_000  # DCP's default: what is copied from the GPU ahead of the writing
MANIFEST_MARK = "accel_moe.manifest"  # in the metadata's storage_meta.modules: this folder has a manifest beside it


# --- writing
# -----------------------------------------------------------------------------------------------------


class _ChecksumStream(io.RawIOBase):
    """A write-only stream that feeds a file and its checksum."""

    def __init__(self, raw: Any, digest: StreamDigest) -> None:
        self._raw, self._digest = raw, digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._digest.update(data, meanwhile=lambda: self._raw.write(data))

    def tell(self) -> int:
        return self._digest.size_bytes  # the stream is only appended to

    def flush(self) -> None:
        self._raw.flush()

    def fileno(self) -> int:
        return self._raw.fileno()


class _ChecksumFileSystem(FileSystem):
    """DCP's file system; every file opened for writing leaves its size and checksum in `written`."""

    def __init__(self, algorithm: str, pool: ThreadPoolExecutor) -> None:
        self.written: dict[str, FileEntry] = {}
        self._algorithm, self._pool = algorithm, pool

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as raw:
            if mode != "wb":
                yield raw
                return
            digest = StreamDigest(self._algorithm, self._pool)
            yield _ChecksumStream(raw, digest)
            raw.flush()
            fsync(raw.fileno())
            self.written[str(path)] = FileEntry(digest.size_bytes, digest.hexdigest())

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        if str(path) in self.written:
            self.written[str(new_path)] = self.written.pop(str(path))


class NodePlanner(DefaultSavePlanner):
    """DCP's planner, for nodes with disks of their own: what several ranks hold is written once on each node.

    DCP writes a replicated value (the optimizer's step counts, HSDP's second copy) on one rank of the world, and a
    node without that rank could not resume from its own disk. `leaders[r]` tells the ranks of one node apart.
    """

    def __init__(self, leaders: Sequence[int]) -> None:
        super().__init__()
        self._leaders = leaders

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        self.global_plan = with_node_copies(all_plans, plans, self._leaders)
        return self.global_plan, metadata


def with_node_copies(wanted: Sequence[SavePlan], plans: Sequence[SavePlan], leaders: Sequence[int]) -> list[SavePlan]:
    """`plans` (deduplicated over the world) and, per node, what its ranks `wanted` and none of them kept."""
    items = [list(plan.items) for plan in plans]
    for leader in set(leaders):
        members = [r for r, other in enumerate(leaders) if other == leader]
        kept = {item.index for r in members for item in items[r]}
        for r in members:
            for item in wanted[r].items:
                if item.index not in kept:
                    items[r].append(item)
                    kept.add(item.index)
    return [dataclasses.replace(plan, items=own) for plan, own in zip(plans, items)]


class ChecksumWriter(FileSystemWriter):
    """FileSystemWriter whose `file_entries()` says what this rank wrote: {file name: FileEntry}.

    Files are fsynced before DCP's write step ends. The checksum is computed from the bytes on their way to the
    disk, by `pool`'s threads, not by reading the file back: what it vouches for is what the program meant to write.

    `leaders[r]` tells the ranks of one disk apart. With several disks the coordinator's `node_metadata` has, by
    leader, the `.metadata` for each other disk: the same but for the files of values that each node wrote a copy of.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        algorithm: str,
        pool: ThreadPoolExecutor,
        leaders: Sequence[int] = (0,),
        copy_ahead_bytes: int = COPY_AHEAD_BYTES,
    ) -> None:
        # DCP's own fsync fails the save where the file system has none: the file system above does it
        super().__init__(path, sync_files=False, overwrite=False, per_thread_copy_ahead=copy_ahead_bytes)
        self.fs = _ChecksumFileSystem(algorithm, pool)
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
        """Of two results for one value DCP takes the later one: those of this disk's ranks are put last."""
        if len(set(self._leaders)) == 1:
            return results
        return [results[r] for r in sorted(range(len(results)), key=lambda r: self._leaders[r] == leader)]

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id, modules=[MANIFEST_MARK])

    def file_entries(self) -> dict[str, FileEntry]:
        return {Path(path).name: entry for path, entry in self.fs.written.items()}


# --- reading
# -----------------------------------------------------------------------------------------------------


class _SpreadFileSystem(FileSystem):
    """Looks for a file in several folders: one DCP folder as several nodes left it on their disks."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    def concat_path(self, path: str | os.PathLike, suffix: str) -> Path:
        for folder in self.folders:
            if (folder / suffix).exists():
                return folder / suffix
        return self.folders[0] / suffix


class FolderReader(FileSystemReader):
    """Reads a DCP folder, or the parts of one that several folders hold.

    A file that this rank's plan needs and that is in none of the folders is reported before anything is
    read, with the node that wrote it (`manifest` knows). DCP turns the error into one raised on every rank.
    """

    def __init__(self, folders: Sequence[str | os.PathLike], manifest: Manifest | None = None) -> None:
        self.folders = [Path(folder) for folder in folders]
        super().__init__(self.folders[0])
        self.fs = _SpreadFileSystem(self.folders)
        self._manifest = manifest

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """`.metadata`, compared with the manifest before it is unpickled (dcp_metadata.py).

        Raises CheckpointError when it is missing, unreadable or not the one that was saved, on whichever rank sees it.
        """
        path = Path(self.fs.concat_path(self.path, METADATA_NAME))
        try:
            metadata = read_metadata(path, self._manifest)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing: the save that wrote this folder never finished, or the copy is "
                f"incomplete. Use "
                "another checkpoint."
            ) from None
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} is not used: {error}. Use another checkpoint, or restore the file."
            ) from None
        except Exception as error:  # a pickle can fail in any way
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}: {error}). Use another checkpoint, or restore the file."
            ) from None
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # as FileSystemReader does
        return metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        plan = super().prepare_local_plan(plan)
        needed = {self.storage_data[item.storage_index].relative_path for item in plan.items}
        for name in sorted(needed):
            if not self.fs.exists(self.fs.concat_path(self.path, name)):
                raise CheckpointError(self.missing(name))
        return plan

    def missing(self, name: str) -> str:
        """The message for a file that is nowhere: its path, who wrote it, what to do."""
        path = f"{self.folders[0].name}/{name}"
        where = ", ".join(str(folder.parent) for folder in self.folders)
        writer = ""
        if self._manifest is not None and path in known_paths(self._manifest):
            writer = f" It was written by {writer_of(self._manifest, path)}."
        return (
            f"{path} is not in {where}, and its values are needed here.{writer} Copy it from there, resume "
            f"with the same "
            "ranks on the same nodes, or save to a shared disk."
        )


def tensors_of(metadata: Metadata) -> dict[str, TensorEntry]:
    """Every tensor of a DCP folder with the chunks that storage really has, keyed by DCP name.

    A chunk that the metadata lists and storage lacks is left out, so that `check_chunks` sees the hole.
    """
    files = {}
    for index, info in (metadata.storage_data or {}).items():
        offset = tuple(index.offset) if index.offset is not None else None
        files[index.fqn, offset] = info.relative_path
    entries = {}
    for name, meta in metadata.state_dict_metadata.items():
        if not isinstance(meta, TensorStorageMetadata):
            continue
        chunks = []
        for chunk in meta.chunks:
            offsets = tuple(chunk.offsets)
            file = files.get((name, offsets), files.get((name, None)))
            if file is not None:
                chunks.append(Chunk(offsets, tuple(chunk.sizes), file))
        dtype = str(meta.properties.dtype).removeprefix("torch.")
        entries[name] = TensorEntry(tuple(meta.size), dtype, tuple(chunks))
    return entries


def same_layout(stored: dict[str, TensorEntry], recorded: dict[str, TensorEntry]) -> bool:
    """Whether two descriptions are of the same tensors in the same chunks.

    Which file has a chunk may differ: between nodes, for a value that each of them wrote.
    """

    def layout(tensors: dict[str, TensorEntry]) -> dict[str, Any]:
        return {n: (t.shape, t.dtype, {(c.offsets, c.sizes) for c in t.chunks}) for n, t in tensors.items()}

    return layout(stored) == layout(recorded)


def was_written_with_manifest(metadata: Metadata) -> bool:
    """Whether accel_moe wrote this DCP folder, so that a manifest must be beside it."""
    return MANIFEST_MARK in getattr(metadata.storage_meta, "modules", ())


def check_metadata(metadata: Metadata) -> list[str]:
    """One line for each tensor whose chunks overlap, stick out, or leave values uninitialised. Empty when
    all is well."""
    return [line for name, entry in tensors_of(metadata).items() if (line := check_chunks(name, entry)) is not None]


class TensorReader:
    """Whole tensors of a model's DCP folder, one at a time: no process group, no GPU, memory of one tensor
    and a chunk.

    `folders` are the same DCP folder as each node left it (one folder with a shared disk). Names are the
    model's own: "model." is taken off, and so is what wrappers put into names.

    Raises CheckpointError when the folder is not a DCP folder, holds no model, or misses its metadata.
    """

    def __init__(self, folders: Sequence[str | os.PathLike], manifest: Manifest | None = None) -> None:
        self.reader = FolderReader(folders, manifest)
        self.metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self._dcp_names: dict[str, str] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self._check_crc = manifest is None  # with one, checksums are compared before any result counts
        self._places = {
            (index.fqn, tuple(index.offset)): info
            for index, info in (self.metadata.storage_data or {}).items()
            if index.offset is not None
        }
        for dcp_name, entry in tensors_of(self.metadata).items():
            if dcp_name.startswith(MODEL_PREFIX):
                name = plain_name(dcp_name.removeprefix(MODEL_PREFIX))
                self._dcp_names[name] = dcp_name
                self.tensors[name] = entry
        if not self.tensors:
            some = ", ".join(list(self.metadata.state_dict_metadata)[:3]) or "nothing"
            raise CheckpointError(
                f"{self.reader.folders[0]} holds no model: expected tensors named model.<parameter>, found "
                f"{some}. Give "
                "the checkpoint folder that save_state or Trainer wrote."
            )

    def missing_files(self) -> list[str]:
        """One line for each data file of the model that is in none of the folders."""
        names = sorted({chunk.file for entry in self.tensors.values() for chunk in entry.chunks})
        fs = self.reader.fs
        return [self.reader.missing(n) for n in names if not fs.exists(fs.concat_path(self.reader.path, n))]

    def check(self) -> list[str]:
        """One line for each tensor whose chunks do not tile it."""
        return [line for name, e in self.tensors.items() if (line := check_chunks(name, e)) is not None]

    def size_bytes(self, name: str) -> int:
        entry = self.tensors[name]
        return math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize

    def read(self, name: str, memory: torch.Tensor | None = None) -> torch.Tensor:
        """The whole tensor `name`, on the CPU, in the dtype it was saved in. Raises CheckpointError.

        `memory` (flat uint8, large enough) is used when given: fresh pages cost as much as the reading.
        """
        entry = self.tensors[name]
        dtype = getattr(torch, entry.dtype)
        if memory is None:
            whole = torch.empty(entry.shape, dtype=dtype)
        else:
            whole = memory[: self.size_bytes(name)].view(dtype).view(entry.shape)
        for chunk in entry.chunks:
            box = whole
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes)):
                box = box.narrow(dim, offset, size)
            info = self._places[self._dcp_names[name], chunk.offsets]
            try:
                self._read_chunk(info, box)
            except CheckpointError:
                raise
            except Exception as error:  # a damaged file fails inside zipfile and torch.load in many ways
                raise CheckpointError(
                    f"{name} cannot be read from {chunk.file} ({type(error).__name__}: {error}). Use another "
                    "checkpoint, or restore the file."
                ) from None
        return whole

    def _read_chunk(self, info: Any, box: torch.Tensor) -> None:
        """Fills `box`, a view of the whole tensor, with one chunk.

        DCP stores a chunk with torch.save: a zip file, uncompressed, inside the data file. Where the tensor in it is
        contiguous, its bytes are read straight to their place; torch.load would copy them twice.
        """
        path = self.reader.fs.concat_path(self.reader.path, info.relative_path)
        if not self.reader.fs.exists(path):
            raise CheckpointError(self.reader.missing(info.relative_path))
        with open(path, "rb", buffering=0) as stream:
            piece: Any = io.BufferedReader(_Piece(stream.fileno(), info.offset, info.length))
            if info.transform_descriptors:  # compressed: only DCP knows how
                plain = self.reader.transforms.transform_load_stream(None, info.transform_descriptors, piece)
                piece = io.BytesIO(plain.read(-1))
            shape = torch.load(piece, map_location="meta", weights_only=True)
            if tuple(shape.shape) != tuple(box.shape) or shape.dtype != box.dtype:
                raise CheckpointError(
                    f"{path} has {tuple(shape.shape)} {shape.dtype} where its metadata says {tuple(box.shape)} "
                    f"{box.dtype}: the file is of another save. Use another checkpoint, or restore the file."
                )
            piece.seek(0)
            record = _only_record(piece)
            size_bytes = box.numel() * box.element_size()
            direct = record is not None and record.size_bytes == size_bytes and shape.is_contiguous()
            if not direct or info.transform_descriptors or shape.storage_offset():
                piece.seek(0)
                box.copy_(torch.load(piece, map_location="cpu", weights_only=True))
                return
            target = box if box.is_contiguous() else torch.empty(box.shape, dtype=box.dtype)
            data = memoryview(target.reshape(-1).view(torch.uint8).numpy())
            _read_exactly(stream, info.offset + record.offset, data, path)
            if self._check_crc and record.crc and zlib.crc32(data) != record.crc:
                raise CheckpointError(
                    f"{path} was damaged: the bytes of {tuple(box.shape)} at offset {info.offset} do not match their "
                    "CRC. Use another checkpoint, or restore the file."
                )
            if target is not box:
                box.copy_(target)


class _Piece(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._position = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._descriptor, [room], self._start + self._position) if len(room) else 0
        self._position += count
        return count


@dataclass(frozen=True)
class _Record:
    """Where the one storage of a torch.save file lies in it, and zip's checksum of it (0: none was computed)."""

    offset: int
    size_bytes: int
    crc: int


def _only_record(piece: Any) -> _Record | None:
    """The record `data/0` of a torch.save zip, or None when there are others or it is compressed."""
    with zipfile.ZipFile(piece) as archive:
        records = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        order = [entry for entry in archive.infolist() if entry.filename.endswith("/byteorder")]
        little = all(archive.read(entry) == b"little" for entry in order) and sys.byteorder == "little"
    if len(records) != 1 or records[0].compress_type != zipfile.ZIP_STORED or not little:
        return None
    piece.seek(records[0].header_offset)
    header = piece.read(30)  # the local header may have another extra field than the directory: torch aligns with it
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    offset = records[0].header_offset + 30 + name_length + extra_length
    return _Record(offset, records[0].file_size, records[0].CRC)


def _read_exactly(stream: Any, offset: int, data: memoryview, path: Path) -> None:
    while len(data):
        count = os.preadv(stream.fileno(), [data[: 1 << 30]], offset)
        if count == 0:
            raise CheckpointError(f"{path} ends {len(data)} bytes too early: it was cut off. Restore the file.")
        data, offset = data[count:], offset + count
