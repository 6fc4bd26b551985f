"""A dispatch in chunks, so that the worst imbalance cannot take more memory than one chunk's.

With every token of the group on one rank, that rank receives (ranks of the group) x (tokens a chunk) rows at a time.
Each chunk runs under activation checkpointing: backward sends its rows again and computes it again, one chunk at a
time. That is the price: two forwards' worth of exchange and expert GEMMs more or less, for a bound.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from accel_moe.dispatch.base import RoutedTokens
from accel_moe.dispatch.collectives import exchange_counts
from accel_moe.dispatch.replay import nothing_kept, replayed


def in_chunks(
    one_pass: Callable[[RoutedTokens], torch.Tensor], tokens: RoutedTokens, limit: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """one_pass(tokens), in chunks of at most `limit` tokens; at once if that is 0. A collective over `group` otherwise.

    Every rank runs as many chunks as the rank with the most tokens needs; some of them may be empty.

    Returns:
        [T, H]: the chunks' results in order.
    """
    if not limit or group is None:
        return one_pass(tokens)
    count = replayed(lambda: _most_chunks(tokens.rows, limit, group))
    with nothing_kept():
        parts = [RoutedTokens(*part) for part in zip(*(t.tensor_split(count) for t in tokens))]
        return torch.cat([checkpoint(one_pass, p, use_reentrant=False, preserve_rng_state=False) for p in parts])


def _most_chunks(tokens: torch.Tensor, limit: int, group: dist.ProcessGroup) -> int:
    ours = torch.tensor([-(-tokens.shape[0] // limit)], device=tokens.device)
    return max(1, int(exchange_counts(ours, group).max()))
