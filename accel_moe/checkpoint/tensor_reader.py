"""Whole tensors of a model's DCP folder, one at a time: in one process, without a process group, in bounded memory."""

from __future__ import annotations

import io
import math
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel_moe.checkpoint.dcp_metadata import MODEL_PREFIX, tensors_of
from accel_moe.checkpoint.dcp_read import FolderReader
from accel_moe.checkpoint.manifest import Manifest, TensorEntry, check_chunks
from accel_moe.errors import CheckpointError
from accel_moe.names import plain_name


class TensorReader:
    """Whole tensors of a model's DCP folder, one at a time: no process group, no GPU, memory of a tensor and a chunk.

    `folders` are the same DCP folder as each node left it (one folder with a shared disk). Names are the model's own,
    without "model." and without what wrappers put into names.

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
            found = ", ".join(list(self.metadata.state_dict_metadata)[:3]) or "nothing"
            raise CheckpointError(
                f"{self.reader.folders[0]} holds no model: expected tensors named model.<parameter>, found {found}. "
                "Give the checkpoint folder that save_state or Trainer wrote."
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

        DCP stores a chunk with torch.save: a zip file, uncompressed, inside the data file. The bytes of a contiguous
        tensor are read straight to their place; torch.load would copy them twice.
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
    """The place of the one storage in a torch.save file, and zip's checksum of it (0: none was computed)."""

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
