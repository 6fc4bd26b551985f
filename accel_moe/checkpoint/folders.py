"""Checkpoint folders: temporary names, who fills them, which folders are committed, cleaning, rotation.

A save never writes under the name that it will have. It fills a folder whose name says that it does not count:

    tmp-0-ckhgbnoapdmi.checkpoint-200    a save under way, or one that died
    del-0-ckhgbnoapdmi.checkpoint-200    a removal under way, or one that died: rubbish in any case
    old-0-ckhgbnoapdmi.checkpoint-200    of accel_moe 0.1: the previous checkpoint-200, while a new one took its place

transaction.py turns the first into a checkpoint. The prefixes keep these folders out of Trainer's `checkpoint-*`,
and their 0 last in accelerate's order, for runs without us.

Who fills a `tmp-0-` folder holds the lock of the owner file in it, as long as it lives. So a later save knows what is
abandoned, whatever killed the owner and whichever container it ran in, and removes that before it writes.

Pure file system work: no process group. With node-local disks every node does it for its own folders.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accel_moe.checkpoint import durable
from accel_moe.errors import CheckpointError
from accel_moe.names import MANIFEST_NAME

JOURNAL_NAME = ".accel_moe_commit.json"  # in a folder whose new files are being moved into place (transaction.py)
_UNFINISHED = re.compile(r"^(?P<kind>tmp|old|del)-0-(?P<id>[a-p]{12})\.(?P<name>.+)$")
_OWNER_NAME = ".accel_moe_owner.json"
_QUIET_S = 15 * 60  # the lock is free, but another machine's may be invisible here: abandoned after this long at rest
_STALE_S = 60 * 60  # no lock, and a process that cannot be looked at: abandoned after this long at rest

_held: set[int] = set()  # descriptors of the owner files that this process has locked


# --- names -------------------------------------------------------------------------------------------------------


def new_save_id() -> str:
    """A fresh id of twelve letters; no digits, which accelerate would take for a checkpoint's number."""
    return "".join(chr(ord("a") + nibble) for byte in os.urandom(6) for nibble in (byte >> 4, byte & 15))


def staging_name(final: Path, save_id: str, *, inside: bool = False) -> Path:
    """Where a save named `final` is prepared: beside it, or inside a folder that is there already.

    Either way it is on the file system that the checkpoint will be on.
    """
    name = f"tmp-0-{save_id}.{final.name or 'root'}"
    return final / name if inside else final.with_name(name)


def unfinished_name(path: Path) -> str | None:
    """The name that an unfinished folder was to have, or None for an ordinary name."""
    match = _UNFINISHED.match(path.name)
    return match["name"] if match else None


def kind_of(path: Path) -> str | None:
    """ "tmp", "old" or "del" for an unfinished folder, None for an ordinary name."""
    match = _UNFINISHED.match(path.name)
    return match["kind"] if match else None


def is_internal(path: Path) -> bool:
    """Whether a file is bookkeeping of the save, and no part of the checkpoint."""
    return path.name in (_OWNER_NAME, JOURNAL_NAME)


# --- who fills a folder ------------------------------------------------------------------------------------------


def create_staging(staging: Path) -> int:
    """Makes the folder, and its owner file with the lock held. Returns the descriptor for `release`.

    Another job's cleaning may remove a folder that is empty, or whose owner file nobody has locked, at any moment: then
    it is made again.
    """
    make_parents(staging.parent)
    while True:
        staging.mkdir(exist_ok=True)
        try:
            descriptor = os.open(staging / _OWNER_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue
        try:
            locked = durable.lock(descriptor, wait=True)
            owner = {"host": _host(), "pid": os.getpid(), "start": _start_of(os.getpid()), "locked": bool(locked)}
            os.write(descriptor, json.dumps(owner).encode())
        except OSError:  # a full disk: leave nothing that looks as if it were in use
            durable.close(descriptor)
            remove(staging)
            raise
        if is_open_at(descriptor, staging / _OWNER_NAME):
            _held.add(descriptor)
            return descriptor
        durable.close(descriptor)


def make_parents(folder: Path) -> None:
    """Makes a folder and what is missing above it, durably."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        durable.fsync_folder(path.parent)


def is_open_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that a path leads to."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def release(descriptor: int) -> None:
    """Gives up the lock that create_staging took."""
    if descriptor in _held:
        _held.discard(descriptor)
        durable.close(descriptor)


def release_all() -> None:
    """Gives up every lock of this process: a save that an interrupt ended is as abandoned as a dead one."""
    for descriptor in list(_held):
        release(descriptor)


def _forget_in_child() -> None:
    """A forked worker of a dataloader must not hold a lock after its parent died, nor end the parent's now."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether nobody fills this folder any more. While it says so nobody else can claim it."""
    try:
        descriptor = _open_owner(folder / _OWNER_NAME)
    except FileNotFoundError:
        yield _ownerless_is_abandoned(folder)
        return
    except OSError:
        yield False
        return
    try:
        locked = durable.lock(descriptor)
        yield locked is not False and _is_gone(_read_owner(descriptor), locked, folder)
    finally:
        durable.close(descriptor)


def _open_owner(path: Path) -> int:
    """For writing where that is allowed: NFS locks nothing else."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _read_owner(descriptor: int) -> dict[str, Any] | None:
    """None for a file whose writer died before it wrote."""
    try:
        owner = json.loads(os.pread(descriptor, 65536, 0))
        return {"host": str(owner["host"]), "pid": int(owner["pid"]), "start": owner["start"]} | {
            "locked": bool(owner.get("locked"))
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _is_gone(owner: dict[str, Any] | None, locked: bool | None, folder: Path) -> bool:
    """Whether the owner of a folder is gone. `locked` says whether its lock was free, None that there are no locks."""
    if owner is None:
        return bool(locked) or _at_rest_s(folder) > _QUIET_S
    if owner["locked"] and locked:
        same_kernel = owner["host"].split()[0] == _host().split()[0]
        return same_kernel or _at_rest_s(folder) > _QUIET_S
    if owner["host"] == _host():
        return _start_of(owner["pid"]) != owner["start"]
    return _at_rest_s(folder) > _STALE_S


def _ownerless_is_abandoned(folder: Path) -> bool:
    """An empty folder's owner died at once. accel_moe 0.1 took the owner file away before its last rename."""
    try:
        if not any(folder.iterdir()):
            return True
    except OSError:
        return not folder.exists()
    name = unfinished_name(folder)
    if name is not None and is_committed(folder) and is_committed(folder.with_name(name)):
        return True
    return _at_rest_s(folder) > _STALE_S


def _at_rest_s(folder: Path) -> float:
    """Seconds since anything in a folder was written."""
    try:
        newest = max((p.lstat().st_mtime for p in [folder, *folder.rglob("*")]), default=0.0)
    except OSError:
        return 0.0
    return time.time() - newest


def _host() -> str:
    """This boot of this machine and its process namespace: a process id only means something within them."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        import socket

        return socket.gethostname() or "unknown"


def _start_of(pid: int) -> float | None:
    """When a process started, so that a reused process id is not taken for its predecessor. None when it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


# --- what is left over -------------------------------------------------------------------------------------------


def unfinished(parent: Path) -> list[Path]:
    """Folders in `parent` that no save has committed, in use or not."""
    return [path for path in children(parent) if _UNFINISHED.match(path.name)]


def leftovers(parent: Path, final: Path | None = None) -> list[Path]:
    """Unfinished folders in `parent`, and those inside `final` and inside the checkpoints of `parent`."""
    found = unfinished(parent)
    inside = {path for path in children(parent) if is_committed(path)}
    inside -= set(found)
    if final is not None:
        inside.add(final)
    return found + [path for folder in sorted(inside) for path in unfinished(folder)]


def clean_abandoned(parent: Path, final: Path | None = None) -> list[str]:
    """Removes unfinished folders that nobody fills any more; returns their names.

    Call `recover` first (transaction.py): it finishes what must not be removed. One that a journal names stays.
    """
    removed = []
    for path in leftovers(parent, final):
        kind = kind_of(path)
        if kind == "del":
            shutil.rmtree(path, ignore_errors=True)
        elif kind == "old":
            if not path.with_name(str(unfinished_name(path))).exists():
                continue  # the only copy
            remove(path)
        elif not is_journaled(path):
            _remove_if_abandoned(path)
        if not path.exists():
            removed.append(path.name)
    return removed


def _remove_if_abandoned(staging: Path) -> None:
    with suppress(OSError):
        staging.rmdir()  # an empty one: its owner died before it left a mark, or makes it again
        return
    with claimed(staging) as abandoned:
        if not abandoned:
            return
        doomed = _doom(staging)
    shutil.rmtree(doomed, ignore_errors=True)  # now that its owner file is closed: NFS keeps open files


def remove(folder: Path) -> None:
    """Deletes a folder that does not count. What a crash leaves of it is recognised as rubbish."""
    shutil.rmtree(_doom(folder), ignore_errors=True)


def _doom(folder: Path) -> Path:
    """Gives a folder a name that says rubbish; returns it. A folder that cannot be renamed keeps its name."""
    doomed = folder.with_name(f"del-0-{new_save_id()}.{unfinished_name(folder) or folder.name}")
    try:
        folder.rename(doomed)
    except OSError:
        return folder
    return doomed


def is_journaled(staging: Path) -> bool:
    """Whether a commit that is not yet finished takes its files from here."""
    try:
        named = json.loads((staging.parent / JOURNAL_NAME).read_text())["staging"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError, KeyError):
        return True  # a journal that cannot be read may name it
    return str(named).split("/")[0] == staging.name


def children(parent: Path) -> list[Path]:
    """The folders in a folder, by name; none where it cannot be read."""
    try:
        return sorted(path for path in parent.iterdir() if os.path.isdir(path))
    except OSError:
        return []


# --- which checkpoints there are ---------------------------------------------------------------------------------


def numbered(parent: Path, prefix: str) -> list[Path]:
    """Folders `<prefix><number>`, lowest number first; unfinished ones are not among them."""
    pattern = re.compile(rf"^{re.escape(prefix)}(\d+)$")
    found = [(int(m[1]), path) for path in children(parent) if (m := pattern.match(path.name))]
    return [path for _, path in sorted(found)]


def is_committed(folder: Path) -> bool:
    """Whether accel_moe committed this folder: it has a manifest, or a journal that brings one."""
    # os.path: a folder that this user may not look into (lost+found) is none
    return os.path.isfile(folder / MANIFEST_NAME) or os.path.isfile(folder / JOURNAL_NAME)


def rotate(parent: Path, prefix: str, keep: int | None, newest: Path, protected: Iterable[Path] = ()) -> list[str]:
    """Deletes the checkpoints that were committed first until `keep` are left; returns the names.

    Call it after the commit of `newest`, which always stays, as it does in transformers, whatever its number: a
    folder may hold higher ones of an earlier run. `protected` ones (the best model) are counted, not deleted.
    Folders without a manifest are not counted and not touched, nor is what a symlink leads to.
    """
    if keep is None or keep <= 0:
        return []
    spared = {os.path.realpath(path) for path in (newest, *protected)}
    committed = [path for path in numbered(parent, prefix) if is_committed(path)]
    committed.sort(key=_commit_time)  # a stable sort: by number where the file system's clock is coarse
    surplus = len(committed) - keep
    removed = []
    for path in committed:
        if surplus <= 0:
            break
        if os.path.realpath(path) in spared or path.is_symlink():
            continue
        doomed = path.with_name(f"del-0-{new_save_id()}.{path.name}")
        with suppress(FileNotFoundError):  # another job that rotates here was first
            path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(path.name)
        surplus -= 1
    return removed


def _commit_time(folder: Path) -> float:
    """When the manifest was written, which is the last file of a save."""
    try:
        return (folder / MANIFEST_NAME).stat().st_mtime
    except OSError:
        return 0.0


def refuse_unfinished(folder: Path) -> None:
    """Raises CheckpointError for a folder that no save committed, by its name."""
    name = unfinished_name(folder)
    if name is not None:
        other = f", such as {name}" if folder.with_name(name).exists() else ""
        raise CheckpointError(
            f"{folder} was never committed: the save that wrote it did not finish. Use a folder that has no "
            f"tmp-0-, old-0- or del-0- before its name{other}."
        )
