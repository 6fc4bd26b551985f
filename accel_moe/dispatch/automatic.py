"""Chooses between two exchanges: every token to every rank, or only the copies that are needed.

An all-gather (all_gather.py) makes no host wait for its GPU, and sends (ranks - 1) rows a token. An all-to-all
(all_to_all.py) waits once a layer, and sends one row to each other rank that has one of the token's experts: it saves
the share (1 - 1/ranks)^K of the rows. Use all-gather when selective sending would save few rows, all ranks share a
node, and the worst-case buffers fit in 1/16 of GPU memory.

The all-gather through symmetric memory (symmetric.py) is not chosen: its copies are faster, and its host is slower.
Steps of six layers took as long with it or longer (examples/benchmarks/RESULTS.md).

All ranks decide alike: from the group, K, and numbers that they have just told each other.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from accel_moe.dispatch import kinds
from accel_moe.dispatch.all_gather import AllGatherDispatcher, GatherRoute
from accel_moe.dispatch.all_to_all import AllToAllDispatcher
from accel_moe.dispatch.base import NO_OVERLAP, Dispatched, Overlap, RoutedTokens
from accel_moe.dispatch.replay import replayed

_NEEDED = 0.75
"""Of the rows that an all-gather sends, the least share that an even routing needs. Measured at 0.996 (ep 2, K 8) and
0.9 (ep 4, K 8)."""
_OF_MEMORY = 1 / 16
"""The share of a GPU's whole memory that buffers for every slot of every row may take. Not of the free memory: a
forward that activation checkpointing runs again must take the exchange that it took before."""


class AutomaticDispatcher:
    """See `accel_moe.dispatch.base.Dispatcher` for the contract of both methods."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int):
        self.group = group
        self._ranks = dist.get_world_size(group)
        self._all_to_all = AllToAllDispatcher(group, num_experts)
        self._all_gather = AllGatherDispatcher(group, num_experts) if AllGatherDispatcher.board(group) else None

    def dispatch(self, tokens: RoutedTokens, work: Overlap = NO_OVERLAP) -> Dispatched:
        gather = self._all_gather
        if gather is not None:
            kind = kinds.kind_of(*tokens)
            # before K decides: ranks with different ones would decide differently, and wait for each other
            route = replayed(lambda: gather.agree(tokens.rows, kind, work.bytes_of_weights))
            needed = 1 - (1 - 1 / self._ranks) ** tokens.index.shape[1]
            if needed >= _NEEDED and gather.most_bytes(route, tokens, work) <= _OF_MEMORY * route.capacity_bytes:
                gather.check_fits(route, tokens, work)
                return gather.send(route, tokens, work)
        return self._all_to_all.dispatch(tokens, work)

    def combine(self, rows: torch.Tensor, sent: Dispatched, work: Overlap = NO_OVERLAP) -> torch.Tensor:
        gathered = isinstance(sent.handle, GatherRoute) and self._all_gather is not None
        backend = self._all_gather if gathered else self._all_to_all
        return backend.combine(rows, sent, work)
