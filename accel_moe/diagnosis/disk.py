"""The folders that a run writes to: space, fsync, rename and locks are tried, not looked up.

A checkpoint is committed by one rename of a folder, and is durable by fsync. A file system that refuses either, or only
pretends, takes the promise away.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from accel_moe.checkpoint import advice
from accel_moe.diagnosis.report import Line, failed, passed, skipped

SHARED = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "fuse.sshfs",
    "fuse.s3fs",
    "wekafs",
    "9p",
)
LEAST_BYTES = 1 << 30
"""Room that every folder should have: compiled kernels, a tokenizer, an adapter."""


def lines(checkpoints: Path, checkpoint_bytes: int) -> Iterator[Line]:
    """A line for the folder of checkpoints and one for each cache.

    Args:
        checkpoint_bytes: the size of one checkpoint; 0 if it is not known.
    """
    yield folder_line("checkpoint folder", checkpoints)
    if checkpoint_bytes:
        yield room_line(checkpoints, checkpoint_bytes)
    home = Path.home()
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    yield folder_line("Triton's cache", triton)
    from huggingface_hub.constants import HF_HUB_CACHE

    yield folder_line("Hub cache", Path(HF_HUB_CACHE))


def folder_line(subject: str, folder: Path) -> Line:
    """The line of one folder; it need not exist. Nothing is left in it."""
    above = _existing(folder)
    try:
        inside = Path(tempfile.mkdtemp(prefix=".accel_moe_doctor_", dir=above))
    except OSError as error:
        return failed(subject, f"{above} cannot be written ({error.strerror})", advice.mend(error.errno, folder))
    try:
        why = broken_step(inside)
    except OSError as error:
        return failed(subject, f"{folder}: {error}", advice.mend(error.errno, folder))
    finally:
        shutil.rmtree(inside, ignore_errors=True)
    if why:
        return failed(
            subject, f"{folder}: {why}", "Keep checkpoints on another file system: a kill may cost the last one."
        )
    free = shutil.disk_usage(above).free
    if free < LEAST_BYTES:
        found = f"{folder}: {advice.human(free)} free, {advice.human(LEAST_BYTES)} needed"
        return failed(subject, found, "Free space, or use another folder (--output, HF_HOME, TRITON_CACHE_DIR).")
    return passed(subject, f"{folder}: {advice.human(free)} free, {kind_of_disk(above)}; fsync and rename work")


def room_line(folder: Path, checkpoint_bytes: int) -> Line:
    """Whether one checkpoint of full training fits. It is no failure if not: an adapter's is small."""
    free, room = shutil.disk_usage(_existing(folder)).free, advice.human(checkpoint_bytes)
    if free < checkpoint_bytes:
        return skipped("room", f"{advice.human(free)} free: no checkpoint of full training fits ({room}); adapters do")
    return passed("room", f"for {free // checkpoint_bytes} checkpoints of full training ({room} each)")


def _existing(folder: Path) -> Path:
    above = folder.absolute()
    while not os.path.exists(above) and above != above.parent:
        above = above.parent
    return above


def broken_step(folder: Path) -> str | None:
    """The first step of a save that this file system gets wrong, or None. Raises OSError for a refused one."""
    content = uuid.uuid4().bytes
    staging, final = folder / "staging", folder / "final"
    staging.mkdir()
    with open(staging / "file.tmp", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging / "file.tmp", staging / "file")
    staging.rename(final)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if staging.exists() or not (final / "file").is_file():
        return "a renamed folder keeps its old name, or loses its files"
    if (final / "file.tmp").exists() or (final / "file").read_bytes() != content:
        return "a renamed file has other bytes, or keeps its old name"
    return None


def kind_of_disk(folder: Path) -> str:
    """ "shared (nfs4)", "local (ext4)" or "of an unknown kind"."""
    import psutil

    with suppress(Exception):  # what a container shows of its mounts differs
        mounts = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
        kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype
        return f"shared between machines ({kind})" if kind.startswith(SHARED) else f"local ({kind})"
    return "of an unknown kind"
