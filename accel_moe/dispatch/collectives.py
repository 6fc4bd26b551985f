"""The only torch.distributed calls inside a forward or a backward.

Thin on purpose: no autograd, no decisions. Every function is a collective over `group`, and is called by every rank of
it in the same order, whatever the sizes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from accel_moe.whereabouts import explained, explaining

# torch 2.13 has other names for them, and warns of the old ones
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Started:
    """A collective under way. If it fails, the error says where every rank was last seen."""

    def __init__(self, work: dist.Work):
        self._work = work

    def wait(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise explained(error)  # noqa: B904  # the same error


@explaining
def exchange_counts(counts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All-gather one small integer tensor per rank: [...] to [ep, ...], rank-major."""
    world = dist.get_world_size(group)
    gathered = torch.empty((world, *counts.shape), dtype=counts.dtype, device=counts.device)
    _all_gather(gathered.view(-1), counts.reshape(-1).contiguous(), group=group)
    return gathered


@explaining
def exchange_rows(
    rows: torch.Tensor,
    received: torch.Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    group: dist.ProcessGroup,
) -> None:
    """All-to-all of whole rows: rows[sum(send_counts), ...], grouped by destination, fill
    received[sum(receive_counts), ...], grouped by source. Both contiguous."""
    dist.all_to_all_single(
        received, rows, output_split_sizes=receive_counts, input_split_sizes=send_counts, group=group
    )


@explaining
def gather_rows(own: torch.Tensor, gathered: torch.Tensor, group: dist.ProcessGroup) -> Started:
    """All-gather of as many rows from every rank: own[n, ...] to gathered[ep * n, ...], rank-major, of which `own` may
    be the part of this rank. Started: wait() of what comes back before gathered is read."""
    work = _all_gather(gathered, own, group=group, async_op=True)
    assert work is not None
    return Started(work)


@explaining
def sum_rows(rows: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, Started]:
    """The transpose, a reduce-scatter: rows[ep * n, ...], contiguous, to [n, ...], this rank's rows of every rank's
    summed. Started, as gather_rows."""
    total = rows.new_empty(rows.shape[0] // dist.get_world_size(group), *rows.shape[1:])
    work = _reduce_scatter(total, rows, group=group, async_op=True)
    assert work is not None
    return total, Started(work)
