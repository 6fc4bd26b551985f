"""OUT: the place where a result is prepared, the checks of its disk before any work, and the way it appears.

An OUT that does not exist is prepared as OUT.tmp and appears whole, by one rename. An OUT that exists and is empty may
be a mount point, or a folder whose parent cannot be written. It is kept, and the result is prepared in a folder inside
it. The files are then moved up one by one, the config last: without it nobody takes the folder for a model. A symlink
stays one.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from accel_moe.checkpoint.durable import fsync_folder
from accel_moe.errors import CheckpointError

JOURNAL = ".accel_moe_journal"
_MOVED = ".accel_moe_moved"  # the names that are moved up, written before the first is
_INSIDE = ".accel_moe_consolidate.tmp"
_OF_THE_SYSTEM = {"lost+found"}  # in the root of a fresh volume


@dataclass(frozen=True)
class Output:
    """The folder of the result, and the folder that it is prepared in: beside it, or inside it."""

    final: Path
    staging: Path

    @property
    def inside(self) -> bool:
        return self.staging.parent == self.final


def place_of(out: Path) -> Output:
    """Raises CheckpointError when OUT has something in it that no earlier, interrupted export put there."""
    final = Path(os.path.realpath(out.expanduser()))
    if not os.path.lexists(final):
        return Output(final, final.with_name(final.name + ".tmp"))
    place = Output(final, final / _INSIDE)
    if not final.is_dir() or _foreign(place):
        raise CheckpointError(f"{out} exists and is not empty. Remove it, or give another OUT.")
    return place


def _foreign(place: Output) -> set[str]:
    return {path.name for path in place.final.iterdir()} - _OF_THE_SYSTEM - {_INSIDE} - set(_moved(place))


def _moved(place: Output) -> list[str]:
    try:
        return json.loads((place.staging / _MOVED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # not there, or not whole: then nothing was moved


def check_writable(place: Output) -> None:
    """Raises CheckpointError when nothing can be made where the result is prepared. Leaves nothing behind."""
    parent = _existing(place)
    probe = parent / f".accel_moe_probe_{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{place.final} cannot be written: {parent} takes no new folder ({error.strerror or error}). Give another "
            "OUT, or one that exists, is empty, and can be written."
        ) from None


def check_room(place: Output, size_bytes: int) -> None:
    """Raises CheckpointError when the disk has less room than the result still needs."""
    disk = os.statvfs(_existing(place))
    if disk.f_blocks == 0:
        return  # a file system that does not say
    free_bytes = (disk.f_bfree if os.geteuid() == 0 else disk.f_bavail) * disk.f_frsize
    there = [path.stat().st_blocks * 512 for path in place.staging.rglob("*") if path.is_file()]
    missing_bytes = size_bytes - sum(there) - free_bytes
    if missing_bytes > 0:
        raise CheckpointError(
            f"the disk of {place.final} has {free_bytes / 1e9:.2f} GB free, and the result needs "
            f"{size_bytes / 1e9:.2f} GB. Make room for {missing_bytes / 1e9:.2f} GB more, or give another OUT."
        )


def _existing(place: Output) -> Path:
    """The nearest folder that there is already."""
    return next(folder for folder in place.staging.parents if folder.exists())


def put_back(place: Output) -> None:
    """Undoes a move that was interrupted, so that the export goes on with all of its files. Call under the lock."""
    for name in _moved(place):
        if os.path.lexists(place.final / name):
            (place.final / name).rename(place.staging / name)
    (place.staging / _MOVED).unlink(missing_ok=True)


def appear(place: Output) -> None:
    """Makes the finished result OUT. Raises CheckpointError when someone else wrote into OUT in the meantime."""
    if not place.inside:
        (place.staging / JOURNAL).unlink()
        fsync_folder(place.staging)
        place.staging.rename(place.final)
        fsync_folder(place.final.parent)
        return
    if foreign := _foreign(place):
        raise CheckpointError(f"{place.final} got {sorted(foreign)[0]} meanwhile, from someone else. Give another OUT.")
    names = {path.name for path in place.staging.iterdir()} - {JOURNAL, _MOVED}
    (place.staging / _MOVED).write_text(json.dumps(sorted(names)), encoding="utf-8")
    fsync_folder(place.staging)
    for name in sorted(names, key=lambda name: (name == "config.json", name)):
        (place.staging / name).rename(place.final / name)
    fsync_folder(place.final)
    shutil.rmtree(place.staging)
    fsync_folder(place.final)
