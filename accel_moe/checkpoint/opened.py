"""The checkpoint that `accel_moe.consolidate` exports: opened and checked, without a process group or a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from accel_moe.checkpoint.dcp_metadata import (
    METADATA_NAME,
    MODEL_FOLDER,
    same_layout,
    tensors_of,
    was_written_with_manifest,
)
from accel_moe.checkpoint.folders import is_committed, numbered, refuse_unfinished
from accel_moe.checkpoint.manifest import Manifest, TensorEntry, check_files, known_paths, read_manifest
from accel_moe.checkpoint.peft_folder import open_adapter_file
from accel_moe.checkpoint.tensor_reader import TensorReader
from accel_moe.checkpoint.transaction import recover
from accel_moe.errors import CheckpointError


class TensorSource(Protocol):
    """The model's tensors in a checkpoint, one at a time, without a process group or a GPU.

    Attributes:
        tensors: by the model's own parameter names.
    """

    tensors: dict[str, TensorEntry]

    def check(self) -> list[str]:
        """One line for each tensor that is not whole."""
        ...

    def missing_files(self) -> list[str]:
        """One line for each file that is not there."""
        ...

    def size_bytes(self, name: str) -> int:
        """Bytes of the whole tensor."""
        ...

    def read(self, name: str, memory: torch.Tensor | None = None) -> torch.Tensor:
        """The whole tensor on the CPU, in the dtype it was saved in; in `memory` (flat uint8, large enough), if given.
        Raises CheckpointError."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        roots: one folder, or one per node.
        dcp_folder: the model's folder inside each; "." if its files lie in the root.
        manifest: None where nothing vouches for the bytes.
        reader: the model's tensors; a TensorReader if there is a manifest.
        written_by: who writes checkpoints without a manifest.
        depends_on: further texts that change when the tensors' values do.
    """

    roots: tuple[Path, ...]
    dcp_folder: str
    manifest: Manifest | None
    reader: TensorSource
    written_by: str = "stock accelerate"
    depends_on: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.roots[0])


def open_checkpoint(folders: Sequence[str | os.PathLike]) -> Checkpoint:
    """Opens a checkpoint folder, or the folders that several nodes wrote of one checkpoint.

    Raises CheckpointError: missing, never committed, no model in it, folders of different checkpoints, a manifest that
    was lost.
    """
    paths = [Path(folder) for folder in folders]
    opened = (open_format(paths) for open_format in reversed(FORMATS.values()))
    return next(checkpoint for checkpoint in opened if checkpoint is not None)


def open_dcp(folders: Sequence[Path]) -> Checkpoint:
    """Opens DCP folders, as accelerate and Trainer write them. The model's DCP folder itself is accepted too."""
    roots = []
    dcp_folder = f"{MODEL_FOLDER}_0"
    for folder in folders:
        recover(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder. Give the folder that save_state or Trainer wrote.")
        folder = folder.resolve()
        if folder.name.startswith(MODEL_FOLDER):
            dcp_folder, folder = folder.name, folder.parent
        elif not (folder / dcp_folder).is_dir() and (folder / METADATA_NAME).is_file():
            dcp_folder, folder = folder.name, folder.parent  # a DCP folder under another name
        recover(folder)
        refuse_unfinished(folder)
        roots.append(folder)
    holders = [root for root in roots if (root / dcp_folder).is_dir()]
    if not holders:
        raise CheckpointError(_no_checkpoint(roots[0], dcp_folder))
    manifests = [manifest for root in roots if (manifest := read_manifest(root)) is not None]
    if any(manifest != manifests[0] for manifest in manifests[1:]):
        raise CheckpointError(
            f"{', '.join(map(str, roots))} are of different checkpoints (their manifests differ). Give the folders "
            "that the nodes wrote in one save."
        )
    manifest = manifests[0] if manifests else None
    reader = TensorReader([root / dcp_folder for root in holders], manifest)
    if manifest is None and was_written_with_manifest(reader.metadata):
        raise CheckpointError(
            f"{roots[0]} was written with a manifest, and it is gone: the copy is incomplete. Copy the folder again, "
            "all of its files."
        )
    return Checkpoint(tuple(roots), dcp_folder, manifest, reader)


def open_adapter(folders: Sequence[Path]) -> Checkpoint | None:
    """Opens a folder that PEFT's save_pretrained wrote. Raises CheckpointError when its weights are missing."""
    if len(folders) != 1 or not folders[0].is_dir():
        return None
    found = open_adapter_file(folders[0])
    return None if found is None else Checkpoint((folders[0].resolve(),), ".", None, found, written_by="PEFT")


FORMATS: dict[str, Callable[[Sequence[Path]], Checkpoint | None]] = {"dcp": open_dcp, "adapter": open_adapter}
"""By name: opens the folders of a checkpoint, or returns None for folders of another format. The format that was added
last is asked first."""


def _no_checkpoint(folder: Path, dcp_folder: str) -> str:
    """The message for a folder without a DCP model: its kind, if known, and which folder to give."""
    names = sorted(path.name for path in folder.iterdir())
    found = ", ".join(names[:6]) or "nothing"
    text = f"{folder} is not a sharded checkpoint: expected {dcp_folder}/ in it, found {found}."
    run = [
        path
        for parent in (folder, folder / "checkpoints")
        for prefix in ("checkpoint-", "checkpoint_")
        for path in numbered(parent, prefix)
        if (path / dcp_folder).is_dir()
    ]
    if run:
        newest = max(run, key=lambda path: (is_committed(path), path.stat().st_mtime))
        return f"{text} It is the folder of a run with {len(run)} checkpoint(s): give one of them, such as {newest}."
    manifest = read_manifest(folder)
    if manifest is not None and manifest.adapter is not None:
        return (
            f"{text} It holds an adapter, as FULL_STATE_DICT saves it. Load it in the training script and save it "
            "with PEFT's save_pretrained, and give that folder; or save with SHARDED_STATE_DICT."
        )
    if any(name.startswith(("pytorch_model", "model")) and name.endswith((".bin", ".safetensors")) for name in names):
        return f"{text} It holds whole weights, as FULL_STATE_DICT saves them: those need no consolidating."
    return text


def check_checkpoint(
    checkpoint: Checkpoint, *, checksums: bool = True, on_bytes: Callable[[int], None] | None = None
) -> list[str]:
    """One line for everything that is wrong with the model's part of a checkpoint. Reads its files once.

    Without a manifest only the chunks and the presence of the files can be checked.
    """
    problems = checkpoint.reader.check() + checkpoint.reader.missing_files()
    manifest = checkpoint.manifest
    if manifest is None:
        return problems
    reader = checkpoint.reader
    assert isinstance(reader, TensorReader)
    recorded = manifest.tensors.get(checkpoint.dcp_folder, {})
    stored = tensors_of(reader.metadata)
    for name in sorted(set(recorded) | set(stored)):
        if name not in stored or name not in recorded or not same_layout({name: stored[name]}, {name: recorded[name]}):
            problems.append(
                f"{name} is not what the manifest says: {METADATA_NAME} was changed or belongs to another save"
            )
            break
    for path in model_files(checkpoint):
        root = next((root for root in checkpoint.roots if (root / path).exists()), None)
        if root is None:
            line = reader.reader.missing(Path(path).name)
            if line not in problems:
                problems.append(line)
            continue
        problems += check_files(root, manifest, paths=[path], checksums=checksums, on_bytes=on_bytes)
    return problems


def model_files(checkpoint: Checkpoint) -> dict[str, int]:
    """Path → size of the model's files (not the optimizer's, which an export does not read)."""
    assert checkpoint.manifest is not None
    return {
        path: entry.size_bytes
        for files in checkpoint.manifest.files
        for path, entry in files.items()
        if path.startswith(f"{checkpoint.dcp_folder}/")
    }


def describe(checkpoint: Checkpoint) -> list[str]:
    """The checkpoint's description, as lines for a terminal. Reads the manifest and DCP's metadata, no tensor."""
    tensors = checkpoint.reader.tensors
    sizes = {name: checkpoint.reader.size_bytes(name) for name in tensors}
    dtypes = sorted({entry.dtype for entry in tensors.values()})
    lines = [f"checkpoint   {', '.join(map(str, checkpoint.roots))}"]
    manifest = checkpoint.manifest
    if manifest is None:
        lines.append(f"manifest     none ({checkpoint.written_by} wrote it)")
    else:
        versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
        lines += [
            f"step         {manifest.step if manifest.step is not None else 'unknown'}",
            f"model        {manifest.model_type or 'unknown'}, base {manifest.base_model or 'unknown'}",
            f"layout       world size {manifest.world_size}: dp_replicate {manifest.dp_replicate}, "
            f"efsdp {manifest.efsdp}, ep {manifest.ep}; written by {', '.join(manifest.nodes)}",
            f"versions     {versions}",
            f"files        {len(known_paths(manifest))}, {manifest.size_bytes / 1e9:.3f} GB, "
            f"checksums {manifest.digest_algorithm}",
        ]
        if (how := manifest.quantised_experts) is not None:
            lines.append(f"experts      {how.scheme}, blocks of {how.block_size}")
        if (adapter := manifest.adapter) is not None:
            kind, r = adapter.config.get("peft_type"), adapter.config.get("r")
            lines.append(f"adapter      {adapter.name}: {kind}, r {r}; the base is not in the checkpoint")
    lines.append(
        f"weights      {len(tensors)} tensors, {sum(sizes.values()) / 1e9:.3f} GB, {', '.join(dtypes)}, "
        f"in {len({c.file for e in tensors.values() for c in e.chunks})} file(s)"
    )
    for name in sorted(sizes, key=lambda n: -sizes[n])[:5]:
        entry = tensors[name]
        lines.append(f"  {sizes[name] / 1e6:10.2f} MB  {name} {list(entry.shape)} in {len(entry.chunks)} chunk(s)")
    return lines
