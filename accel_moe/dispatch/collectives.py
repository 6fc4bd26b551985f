"""The only torch.distributed calls inside a forward or a backward.

Thin on purpose: no autograd, no decisions. Every function but `copied_to_host`, which a collective's result may need
next, is a collective over `group`, and is called by every rank of it in the same order, whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def exchange_counts(counts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All-gather one small integer tensor per rank: [...] to [ep, ...], rank-major."""
    world = dist.get_world_size(group)
    gathered = torch.empty((world, *counts.shape), dtype=counts.dtype, device=counts.device)
    dist.all_gather_into_tensor(gathered.view(-1), counts.reshape(-1).contiguous(), group=group)
    return gathered


def copied_to_host(tensor: torch.Tensor) -> Callable[[], list[Any]]:
    """Start copying to the host, and return what waits for the copy, and for nothing after it, and gives its list."""
    if not tensor.is_cuda:
        return tensor.tolist
    on_host = tensor.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[Any]:
        copied.synchronize()
        return on_host.tolist()

    return wait


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
