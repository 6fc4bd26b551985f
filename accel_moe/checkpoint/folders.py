"""Checkpoint folders: temporary names, the rename that commits, which folders are committed, rotation.

A save never writes under the name that it will have. It fills `tmp-0-<id>.<name>`, and renames that to
`<name>` when everything, the manifest included, is on the disk. So a folder under its own name is complete,
and what a crash leaves behind is recognised by its name alone:

    tmp-0-ckhgbnoapdmi.checkpoint-200    never committed: not resumed from, removed when a later save commits
    old-0-ckhgbnoapdmi.checkpoint-200    the previous checkpoint-200, while a new one took its place

The prefix keeps these out of Trainer's `checkpoint-*`, and its 0 last in accelerate's order, for runs
without us.

Pure file system work on one folder: no process group. With node-local disks every node does it for its own
folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from accel_moe.checkpoint.manifest import MANIFEST_NAME, CheckpointError, fsync_folder

_UNFINISHED = re.compile(r"^(?P<kind>tmp|old)-0-(?P<id>[a-p]{12})\.(?P<name>.+)$")
_OWNER_NAME = ".accel_moe_owner.json"
_STALE_S = 24 * 3600  # a foreign host's unfinished folder is called abandoned after this long without a write


def new_save_id() -> str:
    """A fresh id of twelve letters; no digits, which accelerate would take for a checkpoint's number."""
    return "".join(chr(ord("a") + nibble) for byte in os.urandom(6) for nibble in (byte >> 4, byte & 15))


def staging_name(final: Path, save_id: str) -> Path:
    """Where a save named `final` is prepared: beside it, so that the commit is a rename within one file
    system."""
    return final.with_name(f"tmp-0-{save_id}.{final.name}")


def unfinished_name(path: Path) -> str | None:
    """The name that an unfinished folder was to have, or None for an ordinary name."""
    match = _UNFINISHED.match(path.name)
    return match["name"] if match else None


def create_staging(staging: Path) -> None:
    """Makes the folder and notes who fills it, so that a later run can tell an abandoned one from one in
    use."""
    staging.mkdir(parents=True)
    (staging / _OWNER_NAME).write_text(
        json.dumps({"host": _host(), "pid": os.getpid(), "start": _start_of(os.getpid())})
    )


def is_internal(path: Path) -> bool:
    """Whether a file is bookkeeping of the save, and no part of the checkpoint."""
    return path.name == _OWNER_NAME


def commit(staging: Path, final: Path, save_id: str) -> None:
    """Renames the finished folder to its name. An older folder of that name stays until the new one has
    replaced it.

    Between the two renames the older one is under `<name>.old-<id>`; `recover` puts it back if the process
    dies there.
    """
    (staging / _OWNER_NAME).unlink(missing_ok=True)
    fsync_folder(staging)
    replaced: list[Path] = []
    while True:
        old = final.with_name(f"old-0-{save_id}.{final.name}" if not replaced else _old_name(final))
        try:
            final.rename(old)
            replaced.append(old)
        except FileNotFoundError:
            pass  # nothing to replace, or another job took it just now
        try:
            staging.rename(final)
            break
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                continue  # another job committed the same name between our two renames: the later one wins
            if replaced and not final.exists():
                replaced[-1].rename(final)
            raise
    fsync_folder(final.parent)
    for old in replaced:
        shutil.rmtree(old, ignore_errors=True)


def _old_name(final: Path) -> str:
    return f"old-0-{new_save_id()}.{final.name}"


def recover(parent: Path) -> list[str]:
    """Puts back a checkpoint whose replacement died between the two renames. Returns the names restored."""
    restored = []
    for path in _children(parent):
        match = _UNFINISHED.match(path.name)
        if match and match["kind"] == "old":
            final = path.with_name(match["name"])
            if not final.exists() and _abandoned(parent / f"tmp-0-{match['id']}.{match['name']}"):
                try:
                    path.rename(final)
                    restored.append(final.name)
                except OSError:
                    pass  # another process of this job was first
    return restored


def unfinished(parent: Path) -> list[Path]:
    """Folders beside the checkpoints that no save has committed, in use or not."""
    return [path for path in _children(parent) if _UNFINISHED.match(path.name)]


def clean_abandoned(parent: Path, keep: Iterable[Path] = ()) -> list[str]:
    """Removes unfinished folders that nobody fills any more; returns their names. Call after a commit, on
    one rank."""
    removed = []
    kept = set(keep)
    for path in unfinished(parent):
        if path not in kept and _abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
    return removed


def _abandoned(path: Path) -> bool:
    """Whether nobody fills this folder: its writer is gone (same host), or it has not changed for a day
    (another)."""
    try:
        owner = json.loads((path / _OWNER_NAME).read_text())
        if owner["host"] == _host():
            return _start_of(owner["pid"]) != owner["start"]
    except FileNotFoundError:
        if not path.exists():
            return True
    except (OSError, ValueError, KeyError):
        pass
    try:
        newest = max((p.stat().st_mtime for p in [path, *path.rglob("*")]), default=0.0)
    except OSError:
        return False
    return time.time() - newest > _STALE_S


def _host() -> str:
    """This boot of this machine and its process namespace: a process id only means something within them."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        import socket

        return socket.gethostname()


def _start_of(pid: int) -> float | None:
    """When a process started, so that a reused process id is not taken for its predecessor; None when it is
    gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _children(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []


# --- which checkpoints there are
# ---------------------------------------------------------------------------------


def numbered(parent: Path, prefix: str) -> list[Path]:
    """Folders `<prefix><number>`, lowest number first; unfinished ones are not among them."""
    pattern = re.compile(rf"^{re.escape(prefix)}(\d+)$")
    found = [(int(m[1]), path) for path in _children(parent) if (m := pattern.match(path.name))]
    return [path for _, path in sorted(found)]


def is_committed(folder: Path) -> bool:
    """Whether accel_moe committed this folder: it has a manifest, which is written last."""
    return (folder / MANIFEST_NAME).is_file()


def newest_committed(parent: Path, prefix: str) -> tuple[Path | None, list[str]]:
    """The highest-numbered committed checkpoint, and a line for each folder that was passed over."""
    passed_over = [f"{path.name} was never finished" for path in unfinished(parent)]
    for path in reversed(numbered(parent, prefix)):
        if is_committed(path):
            return path, passed_over
        passed_over.append(f"{path.name} has no manifest")
    return None, passed_over


def rotate(parent: Path, prefix: str, keep: int | None, protected: Iterable[Path] = ()) -> list[str]:
    """Deletes the oldest committed checkpoints until `keep` are left; returns the names. Call after the
    commit.

    Folders without a manifest are not counted and not touched. `protected` ones (the best model) are
    counted, not deleted. A folder is first renamed to an unfinished name, so that a crash while deleting
    leaves nothing half there.
    """
    if keep is None or keep <= 0:
        return []
    committed = [path for path in numbered(parent, prefix) if is_committed(path)]
    spared = {Path(os.path.abspath(path)) for path in protected}
    surplus = len(committed) - keep
    removed = []
    for path in committed[:-1]:  # never the newest
        if surplus <= 0:
            break
        if Path(os.path.abspath(path)) in spared:
            continue
        doomed = staging_name(path, new_save_id())
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(path.name)
        surplus -= 1
    return removed


def refuse_unfinished(folder: Path) -> None:
    """Raises CheckpointError for a folder that no save committed, by its name."""
    name = unfinished_name(folder)
    if name is not None:
        other = f", such as {name}" if folder.with_name(name).exists() else ""
        raise CheckpointError(
            f"{folder} was never committed: the save that wrote it did not finish. Use a folder that has no "
            f"tmp-0- or "
            f"old-0- before its name{other}."
        )
