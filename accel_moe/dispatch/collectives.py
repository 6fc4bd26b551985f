"""The only torch.distributed calls inside a forward or a backward.

Thin on purpose: no autograd, no decisions. Every function is a collective over `group`, and is called by every
rank of it in the same order, whatever the sizes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def exchange_counts(counts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All-gather one small integer tensor per rank: [...] to [ep, ...], rank-major."""
    world = dist.get_world_size(group)
    gathered = torch.empty((world, *counts.shape), dtype=counts.dtype, device=counts.device)
    dist.all_gather_into_tensor(gathered.view(-1), counts.reshape(-1).contiguous(), group=group)
    return gathered


def exchange_rows(
    rows: torch.Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    group: dist.ProcessGroup,
    *,
    zero_rows: int = 0,
) -> torch.Tensor:
    """All-to-all of whole rows: rows[sum(send_counts), ...], grouped by destination, to
    [sum(receive_counts) + zero_rows, ...], grouped by source, with `zero_rows` rows of zeros after them."""
    total = sum(receive_counts)
    received = torch.empty((total + zero_rows, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    received[total:].zero_()
    dist.all_to_all_single(
        received[:total],
        rows.contiguous(),
        output_split_sizes=receive_counts,
        input_split_sizes=send_counts,
        group=group,
    )
    return received
