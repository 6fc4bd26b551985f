"""Bytes of a file from a given place on."""

from __future__ import annotations

import os

_AT_ONCE = 2**30  # bytes: Linux reads no more than 2 GiB in one call
_COPIED_AT_ONCE = 2**24


def read_range(descriptor: int, memory: memoryview, start: int) -> int:
    """Fill `memory` with the bytes of an open file from `start` on.

    Returns the number of bytes read, which is less than asked for only where the file ends.
    """
    done = 0
    while done < len(memory):
        room = memory[done : done + _AT_ONCE]
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [room], start + done)
        else:  # macOS's Python may lack it
            data = os.pread(descriptor, min(len(room), _COPIED_AT_ONCE), start + done)
            count = len(data)
            room[:count] = data
        if count <= 0:
            break
        done += count
    return done
