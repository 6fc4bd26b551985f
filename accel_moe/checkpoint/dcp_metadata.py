"""DCP's `.metadata`, read without running what it says, and what it says of a folder's tensors.

A checkpoint keeps the model under "model.<parameter>" in `pytorch_model_fsdp_<i>`, the optimizer under "optimizer.*"
in `optimizer_<i>`: accelerate's names.

`.metadata` is a pickle, and a pickle can name any function to be called while it is read. So its bytes are compared
with the manifest first, where there is one. And only what DCP itself puts into it is looked up, so that neither a
checkpoint without a manifest nor one whose manifest was made to fit can run anything.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp_classes
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from accel_moe.checkpoint.checksums import StreamDigest
from accel_moe.checkpoint.manifest import Chunk, Manifest, TensorEntry, check_chunks
from accel_moe.errors import CheckpointError

METADATA_NAME = ".metadata"
MODEL_FOLDER = "pytorch_model_fsdp"
OPTIMIZER_FOLDER = "optimizer"
MODEL_PREFIX = "model."
MANIFEST_MARK = "accel_moe.manifest"  # in the metadata's storage_meta.modules: this folder has a manifest beside it

_NAMES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Finds the classes that describe tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = name in _NAMES.get(module, ())
        if module == "torch":
            allowed = allowed or isinstance(getattr(torch, name, None), torch.dtype)
        if module == dcp_classes.__name__:
            found = getattr(dcp_classes, name, None)
            allowed = isinstance(found, type) and found.__module__ == module
        if not allowed:
            raise CheckpointError(
                f"it would call {module}.{name}, which no description of tensors needs; it was not called"
            )
        return super().find_class(module, name)


def read_metadata(path: Path, manifest: Manifest | None) -> Metadata:
    """The `.metadata` at `path`. Raises CheckpointError before anything of it is interpreted if the manifest has
    another; FileNotFoundError; and whatever a damaged pickle raises."""
    data = path.read_bytes()
    if manifest is not None:
        _compare(path, data, manifest)
    metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"it holds a {type(metadata).__name__}, expected DCP's Metadata")
    return metadata


def _compare(path: Path, data: bytes, manifest: Manifest) -> None:
    """Raises CheckpointError when no node wrote these bytes. The checksum is left out where it cannot be computed."""
    name = f"{path.parent.name}/{path.name}"
    entries = [files[name] for files in manifest.files if name in files]
    if not entries:
        raise CheckpointError("the manifest does not list it")
    fitting = {entry.digest for entry in entries if entry.size_bytes == len(data)}
    if not fitting:
        raise CheckpointError(f"it has {len(data)} bytes, the manifest says {entries[0].size_bytes}")
    try:
        digest = StreamDigest(manifest.digest_algorithm)
    except CheckpointError:
        return  # xxhash is not installed here: the check of all files says so, or was told to go by sizes
    digest.update(data)
    if digest.hexdigest() not in fitting:
        raise CheckpointError("it does not match its checksum: its bytes changed")


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
    """One line for each tensor whose chunks overlap, stick out, or leave values uninitialised."""
    return [line for name, entry in tensors_of(metadata).items() if (line := check_chunks(name, entry)) is not None]
