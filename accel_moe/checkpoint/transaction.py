"""The commit of a checkpoint: at every moment one of the old and the new one loads, and nothing foreign is touched.

A save is filled in a folder of its own (folders.py), sealed there with a manifest, and then committed in one step:

    no folder of that name     the filled folder is renamed to it
    a folder is there          a journal appears in it, by a hard link; then its files are moved into place

The journal says which folder inside it the new files lie in. Before it appears the old checkpoint counts, untouched.
Once it is there the new one counts: whoever meets the journal first (this save, a load, the next save, consolidate)
moves the rest of the files, removes those that the old manifest lists and the new one lacks, moves the manifest last,
and takes the journal away. Doing that twice, or in two processes at once, does no harm. What neither manifest lists
is never touched: logs, other checkpoints, the working directory, files beside ours in the same folders. The folder
itself stays the same one, so a mount point, a symlink and a folder whose parent is read-only are like any other.

All of this is file system work of one disk, and no function here is a collective. node_local.py has the disks of
several nodes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path, PurePosixPath

from accel_moe.checkpoint import durable, folders
from accel_moe.checkpoint.folders import JOURNAL_NAME
from accel_moe.checkpoint.manifest import read_manifest
from accel_moe.errors import CheckpointError
from accel_moe.names import MANIFEST_NAME

_PREPARED = "commit.json"  # the journal, until it is linked to its place
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EMLINK, errno.EINVAL}


def absolute(folder: str | os.PathLike) -> Path:
    """The folder under the name that it was given: `~` expanded, symlinks kept."""
    return Path(os.path.abspath(os.path.expanduser(folder)))


def resolved(folder: str | os.PathLike) -> Path:
    """The folder itself: `~` expanded and symlinks followed, also one that leads to nothing yet."""
    return Path(os.path.realpath(os.path.expanduser(folder)))


# --- commit ------------------------------------------------------------------------------------------------------


def prepare(work: Path, final: Path) -> Path:
    """Makes a sealed folder ready to be committed; returns where it is now. Not yet the commit.

    `work` is the folder with the manifest, inside a staging folder. Raises CheckpointError when something foreign is in
    the place of a file.
    """
    if not final.is_dir():
        return work
    if work.parent.parent != final:  # the folder appeared while the save was filled
        try:
            moved = final / work.parent.name
            work.parent.rename(moved)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            raise CheckpointError(
                f"{final} became a mount point while {work.parent} was filled beside it. Save again: the next save is "
                "prepared inside it."
            ) from None
        work = moved / work.name
    _refuse_blockers(work, final)
    staging = work.parent
    entry = {"format": 1, "staging": f"{staging.name}/{work.name}", "manifest": _digest_of(work / MANIFEST_NAME)}
    with open(staging / _PREPARED, "w", encoding="utf-8") as stream:
        json.dump(entry, stream)
        stream.flush()
        durable.fsync(stream.fileno())
    durable.fsync_folder(staging)
    durable.fsync_folder(final)
    return work


def commit(work: Path, final: Path) -> Path:
    """The new checkpoint counts when this returns; returns where its files are now. `move_into_place` follows.

    Another job may commit under the same name at the same time: one comes after the other.
    """
    if work.parent.parent != final:
        try:
            work.rename(final)
            durable.fsync_folder(final.parent)
            return final
        except OSError:
            if not final.is_dir() or not work.is_dir():
                raise
        work = prepare(work, final)  # somebody made the folder meanwhile
    while True:
        recover(final)
        if _put_journal(work.parent / _PREPARED, final / JOURNAL_NAME):
            durable.fsync_folder(final)
            return work


def move_into_place(work: Path, final: Path, staging: Path) -> None:
    """Finishes a commit: the files come to their places, the staging folder goes."""
    if work != final:
        recover(final)
    for path in {staging, work.parent} - {final.parent, final}:
        if path.exists() and not folders.is_journaled(path):
            folders.remove(path)


def discard(work: Path, staging: Path) -> None:
    """Removes what a failed save wrote, wherever it was moved to. What a journal names stays: it counts."""
    for path in {staging, work.parent}:
        if folders.kind_of(path) == "tmp" and path.exists() and not folders.is_journaled(path):
            folders.remove(path)


def _put_journal(prepared: Path, journal: Path) -> bool:
    """Links the journal to its place; False when another one is there. Without hard links it is renamed."""
    try:
        os.link(prepared, journal)
    except FileExistsError:
        return _same_file(prepared, journal)  # NFS repeats a request whose answer was lost
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if journal.exists():
            return False
        os.rename(prepared, journal)
    return True


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _refuse_blockers(work: Path, final: Path) -> None:
    inner, files = _entries(work)
    for name in inner:
        if os.path.lexists(final / name) and not (final / name).is_dir():
            raise CheckpointError(
                f"{final / name} is a file, and the save has a folder of that name. Move it away, or save under "
                "another name."
            )
    for name in files:
        if (final / name).is_dir() and not (final / name).is_symlink():
            raise CheckpointError(
                f"{final / name} is a folder, and the save has a file of that name. Move it away, or save under "
                "another name."
            )


def _entries(work: Path) -> tuple[list[str], list[str]]:
    """(folders, files) below `work`, relative to it; a symlink is a file."""
    inner, files = [], []
    for root, below, names in os.walk(work):
        for name in [*below, *names]:
            path = Path(root, name)
            (inner if path.is_dir() and not path.is_symlink() else files).append(path.relative_to(work).as_posix())
    return sorted(inner), sorted(files)


def _digest_of(manifest: Path) -> str | None:
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


# --- recovery ----------------------------------------------------------------------------------------------------


def recover(folder: str | os.PathLike) -> None:
    """Finishes a commit into this folder that was cut short, at once. Does nothing to any other folder.

    Raises CheckpointError when that needs what is not there, or a permission.
    """
    final = resolved(folder)
    if not os.path.lexists(final):
        _put_back(final)
    journal = final / JOURNAL_NAME
    while True:
        try:
            descriptor = os.open(journal, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise _cannot_finish(final, error) from None
        try:
            durable.lock(descriptor, wait=True)  # two that finish one commit do it one after the other
            if folders.is_open_at(descriptor, journal):
                _roll_forward(final, os.pread(descriptor, 65536, 0))
                return
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise _cannot_finish(final, error) from None
            raise
        finally:
            durable.close(descriptor)


def recover_beside(parent: Path) -> None:
    """Finishes what was cut short in the checkpoints of a folder, as far as that is possible."""
    for path in folders.unfinished(parent):
        if folders.kind_of(path) == "old":
            _put_back(path.with_name(str(folders.unfinished_name(path))))
    for path in folders.children(parent):
        if os.path.isfile(path / JOURNAL_NAME):
            with suppress(OSError, CheckpointError):  # whoever loads that one is told
                recover(path)


def _cannot_finish(final: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{final} was committed, and the process died before all files were in their places. Moving the rest failed: "
        f"{error.strerror} ({error.filename}). Load it once where it can be written."
    )


def _put_back(final: Path) -> None:
    """Of accel_moe 0.1: a checkpoint whose replacement died between two renames comes back under its name."""
    for path in folders.unfinished(final.parent):
        if folders.kind_of(path) == "old" and folders.unfinished_name(path) == final.name and not final.exists():
            with suppress(OSError):  # another process was first, or this one may not write
                path.rename(final)


def _roll_forward(final: Path, journal: bytes) -> None:
    try:
        entry = json.loads(journal)
        staging, name = entry["staging"].split("/")
        digest = entry["manifest"]
        if folders.kind_of(Path(staging)) != "tmp" or name in ("", ".", ".."):
            raise ValueError(f"unexpected folder {staging}/{name}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{final / JOURNAL_NAME} is damaged ({error}). Use another checkpoint; the folder can be removed."
        ) from None
    work = final / staging / name
    if (work / MANIFEST_NAME).exists():
        inner, files = _entries(work)
        for path in inner:
            (final / path).mkdir(parents=True, exist_ok=True)
        for path in files:
            if path != MANIFEST_NAME:
                _move(work / path, final / path)
        emptied = _remove_surplus(final, work)
        for path in {*inner, *emptied, "."}:
            if (final / path).is_dir():
                durable.fsync_folder(final / path)
        _move(work / MANIFEST_NAME, final / MANIFEST_NAME)
        durable.fsync_folder(final)
    if _digest_of(final / MANIFEST_NAME) != digest:
        raise CheckpointError(
            f"{final} was being replaced, and its new files in {staging} are gone. Use another checkpoint; this folder "
            "holds parts of two."
        )
    (final / JOURNAL_NAME).unlink(missing_ok=True)
    durable.fsync_folder(final)
    folders.remove(final / staging)


def _move(source: Path, target: Path) -> None:
    """Puts a file into its place. One that is gone was moved before."""
    try:
        os.replace(source, target)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EXDEV:  # something is mounted at a folder inside
            raise
        copy = target.with_name(f".{target.name}.accel_moe")
        shutil.copy2(source, copy, follow_symlinks=False)
        if not copy.is_symlink():
            durable.fsync_path(copy)
        os.replace(copy, target)
        source.unlink(missing_ok=True)


def _remove_surplus(final: Path, work: Path) -> set[str]:
    """Removes the old checkpoint's files that the new one lacks, by the manifests; returns their folders.

    Nothing is removed if a manifest cannot be read, which vouches for nothing, or is gone, moved by another process.
    """
    new = _own_files(work)
    old = _own_files(final)
    emptied: set[str] = set()
    if new is None or old is None:
        return emptied
    for name in sorted(old - new):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            continue
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            (final / name).unlink()
        emptied |= {str(parent) for parent in path.parents}
        with suppress(OSError):  # until one that something else is in
            for parent in list(path.parents)[:-1]:
                (final / parent).rmdir()
    return emptied


def _own_files(folder: Path) -> set[str] | None:
    try:
        manifest = read_manifest(folder)
        return None if manifest is None else set(manifest.own_files())
    except (CheckpointError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
