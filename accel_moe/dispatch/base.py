"""The dispatcher protocol: what stands between the router and the experts when experts live on other ranks.

    dispatched = dispatcher.dispatch(hidden_states, top_k_index, top_k_weights)
    rows_out   = any_experts_function(view, dispatched.rows, dispatched.local_index, dispatched.local_weights)
    out        = dispatcher.combine(rows_out, dispatched)

A dispatcher knows ranks and nothing of kernels; an experts function knows kernels and nothing of ranks. To add
a backend, write one file with a class of this shape and one line in `DISPATCHERS` (dispatch/__init__.py), there or
from outside (`accel_moe.dispatch.DISPATCHERS["mine"] = Mine`); `moe_dispatcher: mine` then takes it. What it keeps
for a forward that activation checkpointing runs again, it gives through `accel_moe.dispatch.replay.remember`.

Shape letters, here and everywhere: T tokens on this rank, K top-k, H hidden, E experts in all, e experts on this
rank, R rows received, P (row, expert) pairs to compute.

The dispatch returns rows, counts and metadata that combine takes back, after torchtitan's
models/common/token_dispatcher.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Dispatched:
    """What one rank's experts have to compute.

    Attributes:
        rows: [R, H], the hidden states that arrived, in arrival order; perhaps a view, strided by rows. R is at least
            1: a rank that received nothing gets one zero row whose slots are all sentinels, so that every experts
            function still touches its weights and every rank runs the same autograd graph.
        local_index: [R, K] int64, this rank's experts 0..e-1; e is the sentinel: a slot that is not ours.
        local_weights: [R, K], in the dtype the router gave; 0 in sentinel slots.
        num_pairs: how many slots are not sentinels; or what waits for the number, where the host does not know yet.
        handle: whatever `combine` needs; opaque to everyone else.
        rows_ready: None, or what an experts function may call in backward with the gradients of rows and local_weights
            (or None or nothing for one that is not needed) before it computes those of its parameters, so that they
            travel meanwhile. It must then return these very tensors. Gradients in sentinel slots are 0 there.
    """

    rows: torch.Tensor
    local_index: torch.Tensor
    local_weights: torch.Tensor
    num_pairs: int | Callable[[], int]
    handle: Any
    rows_ready: Callable[[torch.Tensor, torch.Tensor], None] | None = None


class Dispatcher(Protocol):
    """One experts layer's road to its ep group and back. Every method is a collective over the ep group: each
    rank calls it once per forward (once per chunk, with moe_dispatch_chunk_tokens), whatever its own number of tokens
    (0 included), and their backwards likewise.

    Attributes:
        group: the ep group.
    """

    group: ProcessGroup

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
        """Send each token to the ranks that own its experts.

        Args:
            hidden_states: [T, H] in the compute dtype. T may differ from rank to rank.
            top_k_index: [T, K] integers; any but 0..E-1 marks a slot without an expert.
            top_k_weights: [T, K] floating point.
            bytes_per_pair: what the experts function will take at least for one (row, expert) pair. Where that
                cannot fit on some rank, every rank raises torch.OutOfMemoryError, before anything is allocated.
            meanwhile: work of the caller that needs nothing of the exchange, and that it does itself afterwards where
                nobody called it; best called when the host has something to wait for.
            bytes_meanwhile: what that allocates.
            counted: num_pairs must be a number, because the experts function makes all its buffers of that size.

        Differentiable in hidden_states and top_k_weights. The gradients of sentinel slots are never read: an
        experts function may leave garbage there.
        """
        ...

    def combine(
        self, rows: torch.Tensor, dispatched: Dispatched, *, meanwhile: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """Bring the experts' weighted sums home: [R, H] rows in arrival order to [T, H], summed per token.

        meanwhile: work of the caller's backward that needs nothing of the exchange; as dispatch's.
        """
        ...
