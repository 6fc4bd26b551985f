"""Which road a dispatch takes: every token to every rank, or only the copies that are needed.

An all-gather (all_gather.py) makes no host wait for its GPU, and sends (ranks - 1) rows a token; an all-to-all
(all_to_all.py) waits once a layer, and sends one row for each other rank that has one of the token's experts: of
ranks - 1, the share (1 - 1/ranks)^K falls away. The first is taken where little falls away, ranks share a node, and the
most that could come takes little of a GPU's memory: buffers that pass are of that size then.

All ranks decide alike: from the group, K, and what they have just told each other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from accel_moe.dispatch import kinds
from accel_moe.dispatch.all_gather import AllGatherDispatcher, GatherRoute
from accel_moe.dispatch.all_to_all import AllToAllDispatcher
from accel_moe.dispatch.base import Dispatched
from accel_moe.dispatch.replay import remember

_NEEDED = 0.75
"""Of the rows that an all-gather sends, the least share that an even routing needs. Measured at 0.996 (ep 2, K 8) and
0.9 (ep 4, K 8)."""
_OF_MEMORY = 1 / 16
"""Of a GPU's whole memory, what buffers for every slot of every row may take. Not of what is free: a forward that
activation checkpointing runs again must take the road that it took before."""


class AutomaticDispatcher:
    """See `accel_moe.dispatch.base.Dispatcher` for the contract of both methods."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int):
        self.group = group
        self._ranks = dist.get_world_size(group)
        self._all_to_all = AllToAllDispatcher(group, num_experts)
        self._all_gather = AllGatherDispatcher(group, num_experts) if AllGatherDispatcher.board(group) else None

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *,
        bytes_per_pair: int = 0,
        meanwhile: Callable[[], None] | None = None,
        bytes_meanwhile: int = 0,
        counted: bool = False,
    ) -> Dispatched:
        top_k, gather = top_k_index.shape[1], self._all_gather
        if gather is not None and not counted:
            kind = kinds.kind_of(hidden_states, top_k_index, top_k_weights)
            # before K decides: ranks with different ones would take different roads, and wait there
            route = remember(lambda: gather.agree(hidden_states, kind, bytes_meanwhile))
            needed = 1 - (1 - 1 / self._ranks) ** top_k
            most = gather.most_bytes(route, hidden_states, top_k, bytes_per_pair)
            if needed >= _NEEDED and most <= _OF_MEMORY * route.capacity_bytes:
                gather.check_fits(route, hidden_states, top_k, bytes_per_pair)
                return gather.send(route, hidden_states, top_k_index, top_k_weights, meanwhile)
        return self._all_to_all.dispatch(
            hidden_states,
            top_k_index,
            top_k_weights,
            bytes_per_pair=bytes_per_pair,
            meanwhile=meanwhile,
            bytes_meanwhile=bytes_meanwhile,
        )

    def combine(
        self, rows: torch.Tensor, dispatched: Dispatched, *, meanwhile: Callable[[], None] | None = None
    ) -> torch.Tensor:
        gathered = isinstance(dispatched.handle, GatherRoute) and self._all_gather is not None
        backend = self._all_gather if gathered else self._all_to_all
        return backend.combine(rows, dispatched, meanwhile=meanwhile)
