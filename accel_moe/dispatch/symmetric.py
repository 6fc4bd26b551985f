"""The all-gather's exchange over memory that the ranks of a node share, without NCCL.

Every rank maps the same buffers of every other rank. Rows then need no collective: a copy engine moves them, which
takes no multiprocessor from the GEMMs beside it, and a barrier of some microseconds says that they are there.

    gather    a rank copies its rows into its own buffer; barrier; it pulls every other rank's rows from theirs
    sum       a rank pushes the rows of every other rank into that rank's buffer; barrier; it adds up what it got, in
              rank order, in fp32, and rounds once

Two slots take turns, and a barrier lies in each turn. A slot is written again two turns later: the barrier between says
that every rank has read what it had to. So one barrier a turn is enough, whichever of the two operations it is. All
copies of a rank are in one stream of their own, which keeps their order.

The buffers are made once for a group, and again only for more rows than ever before: all layers, forwards and backwards
take turns with them. What is received lies in memory of its own, for an experts function may keep it until backward.

On GPUs the memory is torch's symmetric memory (no NVLink multicast). On hosts it is a file in memory, and the barrier
is the board's (host_all_gather.py): the same code, for machines without a GPU.

Pulling by copy engine beside GEMMs is what torch's `_low_contention_all_gather` does (torch/distributed/
_symmetric_memory); it has two barriers for each collective, and its sum is in the rows' dtype.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from accel_moe.dispatch import rows as local
from accel_moe.dispatch.all_gather import AllGatherDispatcher
from accel_moe.dispatch.host_all_gather import HostAllGather, new_board, once_for, shared_page
from accel_moe.mesh import host_timeout

_ALIGN = 256  # bytes
_GROWTH = 1.25
_EVENTS = 64  # in turn: one that is recorded again before it was awaited makes the waiting longer, and not wrong
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


class SymmetricDispatcher(AllGatherDispatcher):
    """AllGatherDispatcher, whose rows travel through shared memory.

    Raises:
        ValueError: the group's ranks are on several nodes, or a GPU cannot map another's memory.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int):
        link = self.link_of(group)
        if link is None:
            raise ValueError(
                "moe_dispatcher='symmetric' needs an ep group of one node, whose GPUs can map each other's memory; "
                "found one that cannot. Use moe_dispatcher='auto', 'all_gather' or 'all_to_all'."
            )
        super().__init__(group, num_experts)
        self._link = link

    @staticmethod
    def link_of(group: dist.ProcessGroup) -> SharedMemoryLink | None:
        """The one of the group; None, on every rank of it, where its ranks cannot share memory. A collective over the
        group the first time."""
        return once_for(group, _links, _new_link)


def _new_link(group: dist.ProcessGroup) -> SharedMemoryLink | None:
    board = new_board(group, 1, host_timeout())
    if board is None or not all(can for (can,) in board.exchange((can_map_peers(group),))):
        return None
    link = SharedMemoryLink(group, board)
    # tried once with little: what fails, fails here
    return link if all(can for (can,) in board.exchange((link.can_grow(),))) else None


def can_map_peers(group: dist.ProcessGroup) -> bool:
    """As far as this rank can tell alone, whether the ranks of a node can map each other's memory. No collective."""
    if not _on_gpus(group):
        return True
    here, others = torch.cuda.current_device(), torch.cuda.device_count()
    if torch.version.hip is not None or others < dist.get_world_size(group):
        return False  # a process that sees its own GPU alone cannot ask about the others
    return all(other == here or torch.cuda.can_device_access_peer(here, other) for other in range(others))


class SharedMemoryLink:
    """The two collectives of an all-gather's exchange (all_gather.Link). Made by all ranks of the group together.

    Raises:
        torch.OutOfMemoryError: a rank has no memory for the buffers; on every rank of the group.
    """

    def __init__(self, group: dist.ProcessGroup, board: HostAllGather):
        self._group, self._board = group, board
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._others = [(self._rank + step) % self._ranks for step in range(1, self._ranks)]
        self._buffers: Buffers | None = None
        self._turn = 0
        self._reserved: Sequence[torch.Tensor] | None = None  # the slot of an outbox

    def can_grow(self) -> bool:
        """Whether the smallest buffers can be made. A collective over the group."""
        try:
            self._with_room(1)
        except RuntimeError:
            return False
        return True

    def outbox(self, gathered: torch.Tensor) -> torch.Tensor:
        """In this rank's buffer: the rows are then pulled from where they were written."""
        size, buffers = gathered.nbytes // self._ranks, self._with_room(gathered.nbytes // self._ranks)
        self._reserved = self._next(buffers)
        buffers.before_writing()
        mine = self._reserved[self._rank][:size].view(gathered.dtype)
        return mine.view(-1, *gathered.shape[1:])

    def gather(self, own: torch.Tensor, gathered: torch.Tensor) -> Arrival:
        size, buffers = own.nbytes, self._with_room(own.nbytes)
        parts = _bytes(gathered).view(self._ranks, size)
        with buffers.aside(own, gathered) as arrival:
            slot, self._reserved = self._reserved or self._next(buffers), None
            mine = slot[self._rank]
            if mine.data_ptr() != own.data_ptr():
                mine[:size].copy_(_bytes(own))
            buffers.barrier()
            for peer in self._others:
                parts[peer].copy_(slot[peer][:size], non_blocking=True)
            if parts[self._rank].data_ptr() != own.data_ptr():
                parts[self._rank].copy_(mine[:size])
        return arrival

    def sum(self, rows: torch.Tensor) -> tuple[torch.Tensor, Arrival]:
        total = rows.new_empty(rows.shape[0] // self._ranks, *rows.shape[1:])
        size, parts = total.nbytes, _bytes(rows).view(self._ranks, -1)
        buffers = self._with_room((self._ranks - 1) * size)
        with buffers.aside(rows, total) as arrival:
            slot = self._next(buffers)
            for peer in self._others:
                place = self._rank - (self._rank > peer)  # among the ranks other than the peer
                slot[peer][place * size : (place + 1) * size].copy_(parts[peer], non_blocking=True)
            buffers.barrier()
            came = slot[self._rank][: (self._ranks - 1) * size].view(rows.dtype)
            own = parts[self._rank].view(rows.dtype).view(total.shape)
            local.sum_over_ranks(own, came.view(self._ranks - 1, *total.shape), self._rank, total)
        return total, arrival

    def _next(self, buffers: Buffers) -> Sequence[torch.Tensor]:
        self._turn += 1
        return buffers.slots[self._turn % 2]

    def _with_room(self, size: int) -> Buffers:
        """Buffers with so many bytes in a slot: all ranks ask for as many in the same turn."""
        if self._buffers is None or self._buffers.size < size:
            if self._buffers is not None:
                self._buffers.finish()
                self._buffers = None  # its memory may be what the new ones need
            size = -(-int(size * _GROWTH) // _ALIGN) * _ALIGN
            self._buffers = (_GpuBuffers if _on_gpus(self._group) else _HostBuffers)(self._group, self._board, size)
        return self._buffers


class Arrival:
    """Rows under way."""

    def __init__(self, done: torch.cuda.Event | None, held: tuple[torch.Tensor, ...]):
        self._done, self._held = done, held

    def wait(self) -> None:
        """What the caller's stream does from now on comes after them. The host does not wait."""
        if self._done is not None:
            self._done.wait()
        self._held = ()  # until here nobody may get their memory


class Buffers:
    """Two slots on every rank, mapped by all.

    Attributes:
        size: bytes of a slot.
        slots: of each slot, every rank's part as this rank sees it, [size] uint8.
    """

    size: int
    slots: list[list[torch.Tensor]]

    def barrier(self) -> None:
        """What every rank wrote before it can be read by every rank after it."""
        raise NotImplementedError

    @contextlib.contextmanager
    def aside(self, *held: torch.Tensor) -> Iterator[Arrival]:
        """The copies inside run beside the caller's work, and after what it has done so far."""
        yield Arrival(None, held)

    def before_writing(self) -> None:
        """What the caller writes into the next slot from now on comes after the last turn's barrier."""

    def finish(self) -> None:
        """Waits until no copy of any rank is under way in them. A collective over the group."""


class _GpuBuffers(Buffers):
    """Torch's symmetric memory. The barrier is a small kernel, which waits for the other GPUs."""

    def __init__(self, group: dist.ProcessGroup, board: HostAllGather, size: int):
        from torch.distributed import _symmetric_memory as symmetric

        self.size = size
        self._timeout_ms = int(host_timeout().total_seconds() * 1e3)
        self._stream = torch.cuda.Stream(priority=-1)  # a barrier gets the next free multiprocessor
        self._events = itertools.cycle([torch.cuda.Event() for _ in range(_EVENTS)])
        self._last = next(self._events)
        failure = None
        try:
            self._memory = symmetric.empty(2 * size, dtype=torch.uint8, device=torch.device("cuda"))
        except RuntimeError as error:
            failure = error
        if not all(ok for (ok,) in board.exchange((failure is None,))):
            raise _no_memory(size) from failure
        with _without_multicast():
            self._handle = symmetric.rendezvous(self._memory, group.group_name)
        ranks = range(dist.get_world_size(group))
        self.slots = [
            [self._handle.get_buffer(rank, (size,), torch.uint8, slot * size) for rank in ranks] for slot in range(2)
        ]

    def barrier(self) -> None:
        self._handle.barrier(0, self._timeout_ms)

    def before_writing(self) -> None:
        self._last.wait()

    @contextlib.contextmanager
    def aside(self, *held: torch.Tensor) -> Iterator[Arrival]:
        caller, ready, done = torch.cuda.current_stream(), next(self._events), next(self._events)
        ready.record(caller)
        arrival = Arrival(done, held)
        torch.cuda.set_stream(self._stream)
        try:
            ready.wait(self._stream)
            yield arrival
        finally:
            done.record(self._stream)
            self._last = done
            torch.cuda.set_stream(caller)

    def finish(self) -> None:
        with torch.cuda.stream(self._stream):
            self.barrier()
        self._stream.synchronize()


class _HostBuffers(Buffers):
    """A file in memory, which every rank has mapped."""

    def __init__(self, group: dist.ProcessGroup, board: HostAllGather, size: int):
        self.size, self._board = size, board
        ranks = dist.get_world_size(group)
        page = shared_page(group, 2 * ranks * size)
        if page is None:
            raise _no_memory(size)
        whole = torch.frombuffer(page, dtype=torch.uint8)[: 2 * ranks * size].view(2, ranks, size)
        self.slots = [list(slot) for slot in whole]

    def barrier(self) -> None:
        self._board.exchange((0,))

    def finish(self) -> None:
        self.barrier()


def _no_memory(size: int) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(
        f"moe_dispatcher=symmetric needs {2 * size / 2**30:.2f} GiB more on every rank for its buffers, and a rank of "
        "the ep group has not as much. Use moe_dispatcher: all_gather or all_to_all, moe_dispatch_chunk_tokens, or a "
        "smaller batch."
    )


@contextlib.contextmanager
def _without_multicast() -> Iterator[None]:
    """Torch makes a multicast object at a rendezvous where the GPUs have it. Nothing here uses one."""
    before = os.environ.get(_NO_MULTICAST)
    os.environ[_NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_MULTICAST]
        else:
            os.environ[_NO_MULTICAST] = before


def _on_gpus(group: dist.ProcessGroup) -> bool:
    return torch.cuda.is_available() and any(d.type == "cuda" for d in group._device_types)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


_links: list[tuple[dist.ProcessGroup, SharedMemoryLink | None]] = []
