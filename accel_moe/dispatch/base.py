"""The dispatcher protocol: tokens to the ranks that own their experts, and the experts' sums back to the tokens' ranks.

    sent = dispatcher.dispatch(tokens, work)
    rows = any_experts_function(view, sent.rows, sent.local_index, sent.local_weights)
    out  = dispatcher.combine(rows, sent, work)

A dispatcher knows ranks and nothing of kernels; an experts function knows kernels and nothing of ranks. To add a
dispatcher, write one file with a class of this shape and one line in `DISPATCHERS` (dispatch/__init__.py), there or
from outside (`accel_moe.dispatch.DISPATCHERS["mine"] = Mine`); `moe_dispatcher: mine` then takes it. It passes what a
forward should not exchange twice under activation checkpointing through `accel_moe.dispatch.replay.replayed`.

Shape letters, here and everywhere: T tokens on this rank, K top-k, H hidden, E experts in all, e experts on this
rank, R rows received, P (row, expert) pairs to compute.

The dispatch returns rows, counts and metadata that combine takes back, after torchtitan's
models/common/token_dispatcher.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch.distributed import ProcessGroup

from accel_moe.kernels.deferred_count import DeferredCount


class RoutedTokens(NamedTuple):
    """This rank's tokens, as the router left them.

    Attributes:
        rows: [T, H] in the compute dtype. T may differ from rank to rank.
        index: [T, K] integers; any but 0..E-1 marks a slot without an expert.
        weights: [T, K] floating point.
    """

    rows: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


class Overlap:
    """The caller's own work, which a dispatcher may overlap with its exchange. This one has none.

    Attributes:
        bytes_per_pair: memory that the experts function takes at least for one (row, expert) pair. Where that cannot
            fit on some rank, every rank raises torch.OutOfMemoryError, before anything is allocated.
        bytes_of_weights: memory that `prepare_weights` takes.
    """

    bytes_per_pair: int = 0
    bytes_of_weights: int = 0

    def prepare_weights(self) -> None:
        """Work of the forward that needs nothing of the exchange. Best called when the host waits for something. The
        caller does it afterwards if no dispatcher did."""

    def for_backward(self) -> Callable[[], None] | None:
        """The same for the backward of `combine`; asked for in its forward."""
        return None


NO_OVERLAP = Overlap()


class Dispatched(NamedTuple):
    """What one rank's experts have to compute.

    Attributes:
        rows: [R, H], the hidden states that arrived, in arrival order; perhaps a view, strided by rows. R is at least
            1: a rank that received nothing gets one zero row whose slots are all sentinels, so that every experts
            function still touches its weights and every rank runs the same autograd graph.
        local_index: [R, K] int64, this rank's experts 0..e-1; e is the sentinel: a slot of another rank's expert.
        local_weights: [R, K], in the router's dtype; 0 in sentinel slots.
        num_pairs: how many slots are not sentinels: a number, or a count that the host learns later. None: unknown.
        handle: whatever `combine` needs; opaque to everyone else.
        on_input_grads: None, or a function that an experts function may call in backward with the gradients of rows and
            local_weights (or None or nothing for one that is not needed), before it computes those of its parameters.
            They then travel while it computes. It must return these very tensors. Gradients in sentinel slots are 0
            there.
    """

    rows: torch.Tensor
    local_index: torch.Tensor
    local_weights: torch.Tensor
    num_pairs: int | DeferredCount | None
    handle: Any = None
    on_input_grads: Callable[[torch.Tensor, torch.Tensor], None] | None = None


class Dispatcher(Protocol):
    """One experts layer's exchange with its ep group. Both methods are collectives over the group: each rank calls them
    once per forward (once per chunk, with moe_dispatch_chunk_tokens), whatever its own number of tokens (0 included),
    and their backwards likewise.
    """

    @property
    def group(self) -> ProcessGroup | None:
        """The ep group; None where there is no other rank."""
        ...

    def dispatch(self, tokens: RoutedTokens, work: Overlap = NO_OVERLAP) -> Dispatched:
        """Send each token to the ranks that own its experts.

        Differentiable in the tokens' rows and weights. The gradients of sentinel slots are never read: an experts
        function may leave garbage there.
        """
        ...

    def combine(self, rows: torch.Tensor, sent: Dispatched, work: Overlap = NO_OVERLAP) -> torch.Tensor:
        """Bring the experts' weighted sums back to the tokens' ranks: [R, H] rows in arrival order to [T, H], summed
        per token."""
        ...
