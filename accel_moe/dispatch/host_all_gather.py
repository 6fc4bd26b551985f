"""Small numbers between the hosts of one node, without a GPU and without a socket.

Ranks that must agree on sizes which each of them knows on its host (how many tokens it has, how much memory is free)
could ask a collective; on the GPU it would stand behind all work in the queue, and over gloo it takes half a
millisecond. Ranks of one node share memory: each writes its numbers into a page that all of them mapped, and reads the
others'. A few microseconds, when all are there.
"""

from __future__ import annotations

import datetime
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from accel_moe.whereabouts import explained

T = TypeVar("T")

_LOOKS = 200  # at a number before the processor is offered to whoever wants it
_AWAKE_S = 1.0  # a nap can take milliseconds where timers are coarse: only for ranks that do something else
_NAP_S = 1e-3
LARGEST = 2**32 - 1


class HostAllGather:
    """A page that the ranks of one group share. Made by `host_all_gather_of`."""

    def __init__(self, page: mmap.mmap, rank: int, ranks: int, numbers: int, timeout: datetime.timedelta):
        self._words = memoryview(page).cast("Q")
        self._rank, self._ranks, self._numbers = rank, ranks, numbers
        self._timeout_s = timeout.total_seconds()
        self._turn = 0

    def exchange(self, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        """Each rank's numbers, in rank order. A collective of hosts, called by every rank in the same order.

        Args:
            numbers: as many as the board was made for, each from 0 to LARGEST; larger ones are given as that.

        Raises:
            RuntimeError: a rank did not come before the process group's timeout.
        """
        # A word holds a number and the turn it belongs to, and is written at once. Two sets of words take turns: nobody
        # can be two turns ahead of a rank that still reads, for it would have to pass a turn which that rank has not
        # written yet.
        self._turn = self._turn % LARGEST + 1
        first = (self._turn % 2) * self._ranks * self._numbers
        for i, number in enumerate(numbers):
            self._words[first + self._rank * self._numbers + i] = self._turn << 32 | min(number, LARGEST)
        found = [self._wait_for(first + i, i // self._numbers) for i in range(self._ranks * self._numbers)]
        return [tuple(found[i : i + self._numbers]) for i in range(0, len(found), self._numbers)]

    def _wait_for(self, at: int, rank: int) -> int:
        looks, since = 0, 0.0
        while (word := self._words[at]) >> 32 != self._turn:
            looks += 1
            if looks < _LOOKS:
                continue
            now = time.monotonic()
            since = since or now
            if now - since > self._timeout_s:
                failure = RuntimeError(
                    f"ep rank {rank} did not come to exchange {self._turn} within {self._timeout_s:.0f} s (the process "
                    "group's timeout): it has died, or runs another model or another number of layers. See its log."
                )
                raise explained(failure)
            if now - since > _AWAKE_S:
                time.sleep(_NAP_S)
            else:
                os.sched_yield()
        return word & LARGEST


_boards: list[tuple[dist.ProcessGroup, HostAllGather | None]] = []


def host_all_gather_of(group: dist.ProcessGroup, numbers: int, timeout: datetime.timedelta) -> HostAllGather | None:
    """The board of a group for `numbers` numbers a rank; None, on every rank of it, where its ranks share no memory.

    A collective over the group the first time; afterwards the same board comes back.
    """
    return once_for(group, _boards, lambda group: new_board(group, numbers, timeout))


def once_for(
    group: dist.ProcessGroup, made: list[tuple[dist.ProcessGroup, T]], make: Callable[[dist.ProcessGroup], T]
) -> T:
    """make(group), kept in `made` for the next call. What was made for groups that are no more is let go: it would keep
    their threads and sockets."""
    alive = dist.distributed_c10d._world.pg_map
    made[:] = [entry for entry in made if entry[0] in alive]
    for known, found in made:
        if known is group:
            return found
    found = make(group)
    made.append((group, found))
    return found


def new_board(group: dist.ProcessGroup, numbers: int, timeout: datetime.timedelta) -> HostAllGather | None:
    """One that nobody else has. None, on every rank of the group, where its ranks share no memory. A collective over
    the group."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    page = shared_page(group, 8 * 2 * ranks * numbers)
    return None if page is None else HostAllGather(page, rank, ranks, numbers, timeout)


def shared_page(group: dist.ProcessGroup, size: int) -> mmap.mmap | None:
    """Zeroed memory of at least `size` bytes that all ranks of the group have mapped; None, on every rank of it, where
    they share none. A collective over the group."""
    rank = dist.get_rank(group)
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    path, page = None, None
    if rank == 0:
        path = _new_file(size)
    offered = [(path, platform.node())]
    dist.broadcast_object_list(offered, group=group, group_src=0)
    path, node = offered[0]
    if path is not None and node == platform.node():
        page = _mapped(path, size)
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, page is not None, group=group)
    if rank == 0 and path is not None:
        Path(path).unlink(missing_ok=True)  # the mappings stay
    return page if all(everyone) else None


def _new_file(size: int) -> str | None:
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None  # memory, where there is such a folder
    path = None
    try:
        handle, path = tempfile.mkstemp(prefix="accel_moe_", dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(bytes(size))  # and not a hole, which a full folder could not fill when it is written to
    except OSError:
        if path is not None:
            Path(path).unlink(missing_ok=True)
        return None
    return path


def _mapped(path: str, size: int) -> mmap.mmap | None:
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), size)
    except (OSError, ValueError):
        return None
