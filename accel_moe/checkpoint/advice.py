"""What to do about an error of the operating system while a checkpoint is saved.

A full disk, a missing permission, a disk that fails: the error itself says neither where nor what would help. Here it
gets a sentence, `mend`, which ranks.describe puts behind it. For a full disk the sentence names what takes the space.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from accel_moe import ranks
from accel_moe.checkpoint import folders
from accel_moe.errors import CheckpointError

T = TypeVar("T")


@contextmanager
def told_with_a_mend(final: Path) -> Iterator[None]:
    """An error of the operating system while `final` is saved gets a sentence on what to do (ranks.describe)."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        inner: Any = error
        if isinstance(error, CheckpointException) and error.failures:
            first: Any = error.failures[min(error.failures)]
            inner = first[0] if isinstance(first, tuple) else first
        if (code := _errno_of(inner, final)) is not None:
            inner.mend = mend(code, final)
        raise


def run_advised(final: Path, what: str, step: Callable[[], T]) -> T:
    """ranks.run_or_raise_everywhere, of a step that saves `final`: its OSErrors carry the sentence. A collective."""

    def advised() -> T:
        with told_with_a_mend(final):
            return step()

    return ranks.run_or_raise_everywhere(what, advised)


def _errno_of(error: BaseException, final: Path) -> int | None:
    if isinstance(error, CheckpointError):
        return None
    if isinstance(error, OSError):
        return error.errno
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        return int(match[1])
    if re.search("PytorchStreamWriter|inline_container|iostream error", str(error)):  # torch.save does not say why
        free = _free_bytes(final)
        return errno.ENOSPC if free is not None and free < 1 << 20 else errno.EIO
    return None


def mend(code: int | None, final: Path) -> str:
    """What a user can do about an error of the operating system while `final` was saved."""
    if code in (errno.ENOSPC, errno.EDQUOT):
        free = _free_bytes(final)
        have = "" if free is None else f" ({human(free)} free)"
        return f"The disk or quota of {final.parent} is full{have}. Free space, or save elsewhere.{_removable(final)}"
    if code in (errno.EACCES, errno.EPERM):
        return f"Allow this user to write in {final if os.path.isdir(final) else final.parent}, or save elsewhere."
    if code == errno.EROFS:
        return f"{final.parent} is mounted read-only: remount it, or save elsewhere."
    if code in (errno.EMFILE, errno.ENFILE):
        return "Raise the limit of open files (ulimit -n), and save again."
    if code == errno.EFBIG:
        return "Raise the limit of a file's size (ulimit -f), or save on another file system."
    if code == errno.ENAMETOOLONG:
        return "Give the checkpoint a shorter name."
    if code in (errno.ENOTDIR, errno.EEXIST, errno.ELOOP):
        return f"A part of {final} is no folder: save under another name."
    if code == errno.ENOENT:
        return "Something removed files while they were being saved: find it, and save again."
    return f"The file system of {final.parent} failed: see its server or the kernel's log. Save again, or elsewhere."


def _removable(final: Path) -> str:
    """A sentence on the folders that take space beside a checkpoint, largest first; "" if none."""
    left = [(_size_bytes(path), path) for path in folders.leftovers(final.parent, final)]
    kept = [(_size_bytes(path), path) for path in _beside(final) if folders.is_committed(path)]
    told = ""
    if left:
        told += f" Left over from other saves, to be removed if no job is writing them: {_listed(left)}."
    if kept:
        told += f" Checkpoints there: {_listed(kept)}."
    return told


def _beside(final: Path) -> list[Path]:
    with suppress(OSError):
        return [path for path in final.parent.iterdir() if folders.kind_of(path) is None]
    return []


def _listed(sized: list[tuple[int, Path]]) -> str:
    sized = sorted(sized, reverse=True)
    more = f" and {len(sized) - 4} more" if len(sized) > 4 else ""
    return ", ".join(f"{path.name} ({human(size)})" for size, path in sized[:4]) + more


def _size_bytes(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        for path in folder.rglob("*"):
            total += path.lstat().st_size
    return total


def _free_bytes(path: Path) -> int | None:
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def human(size_bytes: int) -> str:
    """1234567 -> "1.2 MB"."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if size_bytes >= 10**power:
            return f"{size_bytes / 10**power:.1f} {unit}"
    return f"{size_bytes} bytes"
