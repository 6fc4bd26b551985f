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

from accel_moe.dispatch.collectives import exchange_counts
from accel_moe.dispatch.replay import nothing_kept, remember


def in_chunks(
    layer: Callable[..., torch.Tensor], limit: int, group: dist.ProcessGroup, tokens: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """layer(*tokens) for tensors [T, ...], in chunks of at most `limit` tokens. A collective over `group`.

    Every rank runs as many chunks as the rank with the most tokens needs; some of them may be empty.

    Returns:
        [T, H]: the chunks' results in order.
    """
    count = remember(lambda: _most_chunks(tokens[0], limit, group))
    with nothing_kept():
        parts = zip(*(t.tensor_split(count) for t in tokens))
        return torch.cat([checkpoint(layer, *p, use_reentrant=False, preserve_rng_state=False) for p in parts])


def _most_chunks(tokens: torch.Tensor, limit: int, group: dist.ProcessGroup) -> int:
    ours = torch.tensor([-(-tokens.shape[0] // limit)], device=tokens.device)
    return max(1, int(exchange_counts(ours, group).max()))
