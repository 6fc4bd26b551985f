"""The reader of one DCP folder, which may be spread over several disks.

`.metadata` is a pickle of which only descriptions of tensors are read (dcp_metadata.py). The byte entries of an
optimizer are pickles that DCP reads whole: resume only from where you would run code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan

from accel_moe.checkpoint.dcp_metadata import METADATA_NAME, read_metadata
from accel_moe.checkpoint.manifest import Manifest, known_paths, writer_of
from accel_moe.errors import CheckpointError


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

    A file that this rank's plan needs and that is in none of the folders is reported before anything is read, with the
    node that wrote it (`manifest` knows). DCP turns the error into one raised on every rank.
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
                f"{path} is missing: the save that wrote this folder never finished, or the copy is incomplete. Use "
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
            f"{path} is not in {where}, and its values are needed here.{writer} Copy it from there, resume with the "
            "same ranks on the same nodes, or save to a shared disk."
        )
