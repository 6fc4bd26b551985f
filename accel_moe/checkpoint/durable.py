"""fsync and flock, on file systems that may refuse them.

Some NFS, CIFS and FUSE file systems know no fsync of a folder, or no flock. Such a refusal weakens a promise. The
process warns of it once, and no save or export stops. An error of the disk itself (EIO, ENOSPC) is raised.
"""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from contextlib import suppress

_REFUSALS = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.ENOLCK,
    errno.EACCES,
    errno.EPERM,
    errno.EBADF,
    errno.EISDIR,
    errno.EROFS,
}
_told: set[str] = set()


def fsync(
    descriptor: int, kind: str = "a file", consequence: str = "a power failure may lose what was written last"
) -> None:
    """Makes an open file's contents durable. Raises OSError when the disk fails."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        _weaker(f"fsync of {kind}", error, consequence)


def fsync_path(path: str | os.PathLike) -> None:
    """Makes a closed file's contents durable. Raises OSError when the disk fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: str | os.PathLike) -> None:
    """Makes the names in a folder durable: a rename or a new file is only safe after this."""
    kind, consequence = "a folder", "a power failure may lose the newest checkpoint"
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError as error:  # a folder that may be written and not read
        _weaker(f"fsync of {kind}", error, consequence)
        return
    try:
        fsync(descriptor, kind, consequence)
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Takes the exclusive lock of an open file. True: it is ours until the file is closed. False: another has it.

    None: the file system has no such locks. With `wait` it waits for the other.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        _weaker("flock", error, "an abandoned save is recognised by its process id, or by its age")
        return None
    return True


def close(descriptor: int) -> None:
    """Closes a file that may be locked. Its lock ends too, although a forked child may have the file open."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _weaker(call: str, error: OSError, consequence: str) -> None:
    """Warns of a refusal once; raises any other error."""
    if error.errno not in _REFUSALS:
        raise error
    if call not in _told:
        _told.add(call)
        warnings.warn(f"the file system refuses {call} ({error.strerror}): {consequence}.", stacklevel=4)
