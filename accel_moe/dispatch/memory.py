"""A check that the received rows fit in memory, before anything is allocated, with the same answer on every rank.

A router may send everything to one rank. That rank would run out of memory in the middle of a layer, and the others
would wait for it until the process group's timeout. Every rank has the whole group's counts, and with them comes how
much memory each rank has left: so all of them can see it coming, and raise.
"""

from __future__ import annotations

import functools

import torch

UNKNOWN = 2**62
"""Free bytes where nobody can say: on a CPU, the operating system decides."""


def free_bytes(device: torch.device) -> int:
    """What the caching allocator could still hand out on `device`, fragmentation aside. No sync."""
    if device.type != "cuda":
        return UNKNOWN
    allocated = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["current"]
    left = _capacity(device) - allocated
    if left < _capacity(device) // 5:  # others may have taken or given back memory since it was measured
        _capacity.cache_clear()
        left = _capacity(device) - allocated
    return left


def capacity_bytes(device: torch.device) -> int:
    """All that this process's tensors may take on `device`, whatever they take now. UNKNOWN on a CPU."""
    if device.type != "cuda":
        return UNKNOWN
    total = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


@functools.cache
def _capacity(device: torch.device) -> int:
    """All that this process's tensors may take. Measured now and then: asking the driver in every layer is slow."""
    free, _ = torch.cuda.mem_get_info(device)
    return min(free + torch.cuda.memory_reserved(device), capacity_bytes(device))


def check_fits(
    rows: list[int], pairs: list[int], free: list[int], *, bytes_per_row: int, bytes_per_pair: int, tokens: int
) -> None:
    """Raises where a rank of the group cannot hold what it would receive.

    Args:
        rows, pairs, free: per rank of the group; the same lists on every rank.
        bytes_per_row, bytes_per_pair: a lower bound of what one row, and one (row, expert) pair, take.
        tokens: of the caller, for the advice.

    Raises:
        torch.OutOfMemoryError: on every rank of the group, naming the rank and the way out.
    """
    for rank, (r, p, left) in enumerate(zip(rows, pairs, free)):
        needed = r * bytes_per_row + p * bytes_per_pair
        if needed > left:
            share = p * len(pairs) / max(1, sum(pairs))
            raise torch.OutOfMemoryError(
                f"The experts of ep rank {rank} were sent {r} rows for {p} (row, expert) pairs, {share:.1f}x an even "
                f"share, which take at least {needed / 2**30:.2f} GiB; it has {left / 2**30:.2f} GiB free. Set "
                f"moe_dispatch_chunk_tokens to less than the {tokens} tokens of this batch, or use a smaller batch."
            )
