"""Dispatch by all-to-all, each row sent once per rank.

A token whose top-k falls on one rank several times travels there once, together with its local indices and routing
weights; the owning rank computes the weighted sum over its own experts and returns one row. So (token, rank) pairs
travel, not (token, expert) pairs: about 0.27 of the bytes at ep 2 and K 8. Rows for our own experts do not travel: they
are packed straight into their place among the received ones.

One layer's forward, in numbered phases; local ones are functions of rows.py:

    1. count      rows and pairs for each rank                                     local, no sync
    2. counts     all-gather of them, of free memory and the rows' kind            collective, THE host sync
                  overlapped: the caller's own work, and placing the copies
    3. out        pack, then all-to-all of rows with their indices and weights     collective
                  the experts function runs
    4. combine    all-to-all of the weighted sums, then a sum over each token's copies      collective

Out and combine are each other's transpose, so each is the other's backward. In the backward of out, the routing
weights' gradients travel with the rows' gradients. Each slot takes the value of the rank that computed it; values that
an experts function left in its sentinel slots are never read.

Nothing here branches on a count around a collective: ranks with no token, or none received, run the same ops.

One row per (token, rank) rather than per (token, expert), and top-k indices and weights sent with the rows, follow
DeepEP (deepseek-ai/DeepEP, README, "dispatch").
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from accel_moe.dispatch import kinds, memory, rows
from accel_moe.dispatch.base import NO_OVERLAP, Dispatched, Overlap, RoutedTokens
from accel_moe.dispatch.collectives import exchange_counts, exchange_rows
from accel_moe.dispatch.replay import replayed
from accel_moe.dispatch.rows import RowLayout, Rows
from accel_moe.kernels.deferred_count import copied_to_host


@dataclass(frozen=True)
class Route:
    """Where each token's copies sit in the exchange.

    Attributes:
        index: [T, K], the router's.
        slot, copy: of rows.place.
        send_counts, receive_counts: rows to and from each rank of the group; 0 for ourselves.
        num_own: the copies that stay.
    """

    index: torch.Tensor
    slot: torch.Tensor
    copy: torch.Tensor
    send_counts: list[int]
    receive_counts: list[int]
    num_own: int
    experts_per_rank: int
    group: dist.ProcessGroup

    @property
    def num_sent(self) -> int:
        return sum(self.send_counts)

    @property
    def num_received(self) -> int:
        """From the others. R, of which our experts are given at least 1, is num_received + num_own."""
        return sum(self.receive_counts)


class AllToAllDispatcher:
    """See `accel_moe.dispatch.base.Dispatcher` for the contract of both methods."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int):
        self.group = group
        self.ep = dist.get_world_size(group)
        self.ep_rank = dist.get_rank(group)
        assert num_experts % self.ep == 0, (num_experts, self.ep)
        self.num_local_experts = num_experts // self.ep

    def dispatch(self, tokens: RoutedTokens, work: Overlap = NO_OVERLAP) -> Dispatched:
        route, num_pairs = replayed(lambda: self._route(tokens, work))
        values, local_index, local_weights = _SendOut.apply(tokens.rows, tokens.weights, route)
        return Dispatched(values, local_index, local_weights, num_pairs, route)

    def combine(self, rows: torch.Tensor, sent: Dispatched, work: Overlap = NO_OVERLAP) -> torch.Tensor:
        return _SendBack.apply(rows, sent.handle)

    def _route(self, tokens: RoutedTokens, work: Overlap) -> tuple[Route, int]:
        kind = kinds.kind_of(*tokens)
        index = tokens.index.contiguous()
        free = memory.free_bytes(index.device) - work.bytes_of_weights
        ours, counted = rows.count(index, self.num_local_experts, self.ep, kinds.with_free_bytes(kind, free))
        gathered = copied_to_host(exchange_counts(ours, self.group))
        # the GPU has work while the host waits for the counts, and while it launches what they decide
        work.prepare_weights()
        slot, copy = rows.place(index, counted, self.num_local_experts, self.ep, self.ep_rank)
        counts = gathered()  # [from][to][3]; host sync: sizes are Python integers
        rows_to = [sum(of[to][0] for of in counts) for to in range(self.ep)]
        pairs_to = [sum(of[to][1] for of in counts) for to in range(self.ep)]
        kind_on, free_on = zip(*(kinds.apart(of[0][2]) for of in counts))
        kinds.check(kind_on, kind, self.group)
        memory.check_fits(
            rows_to,
            pairs_to,
            list(free_on),
            bytes_per_row=tokens.rows.shape[1] * tokens.rows.element_size(),
            bytes_per_pair=work.bytes_per_pair,
            tokens=len(index),
        )
        send_counts = [to[0] for to in counts[self.ep_rank]]
        receive_counts = [of[self.ep_rank][0] for of in counts]
        num_own = send_counts[self.ep_rank]
        send_counts[self.ep_rank] = receive_counts[self.ep_rank] = 0
        route = Route(index, slot, copy, send_counts, receive_counts, num_own, self.num_local_experts, self.group)
        return route, pairs_to[self.ep_rank]


def _send_out(source: torch.Tensor, weights: torch.Tensor | None, layout: RowLayout, route: Route) -> torch.Tensor:
    """[T, H] (and [T, K], which then travel with the local expert numbers) to [max(R, 1), layout.width]: the rows from
    the other ranks, by source, then our own. The one row of a rank that received nothing is zero, without an expert."""
    sent = layout.empty(route.num_sent, source.device)
    count = route.num_received + route.num_own
    received = layout.empty(max(1, count), source.device)
    if not count and (index := layout.view(received.zero_()).index) is not None:
        index.fill_(route.experts_per_rank)
    others, own = received[: route.num_received], received[route.num_received : count]
    index = None if weights is None else route.index
    to_others, to_own, ranks = layout.view(sent), layout.view(own), route.slot.shape[1]
    rows.pack(source, route.copy, index, weights, to_others, to_own, route.experts_per_rank, ranks)
    exchange_rows(layout.wire(sent), layout.wire(others), route.send_counts, route.receive_counts, route.group)
    return received


def _send_back(
    values: torch.Tensor, weights: torch.Tensor | None, route: Route
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[max(R, 1), H] (and [max(R, 1), K]) to [T, H], each token's copies summed (and [T, K])."""
    values = values.contiguous()
    others, own = slice(route.num_received), slice(route.num_received, route.num_received + route.num_own)
    if weights is None:
        layout, sent, kept = RowLayout(values.shape[1], values.dtype), values[others], Rows(values[own])
    else:
        weights = weights.contiguous()
        layout = RowLayout(values.shape[1], values.dtype, weights.shape[1], weights.dtype)
        sent = layout.empty(route.num_received, values.device)
        nothing = layout.view(sent[:0])
        rows.pack(values[others], None, None, weights[others], layout.view(sent), nothing, route.experts_per_rank, 1)
        kept = Rows(values[own], weights[own])
    returned = layout.empty(route.num_sent, values.device)
    exchange_rows(layout.wire(sent), layout.wire(returned), route.receive_counts, route.send_counts, route.group)
    return rows.combine(layout.view(returned), kept, route.slot, route.index, route.experts_per_rank)


class _SendOut(torch.autograd.Function):
    """Phase 3: rows, local indices and routing weights; the way back of their gradients."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, top_k_weights: torch.Tensor, route: Route):
        ctx.route = route
        ctx.set_materialize_grads(False)
        weights = top_k_weights.contiguous()
        layout = RowLayout(hidden_states.shape[1], hidden_states.dtype, weights.shape[1], weights.dtype, True)
        received = replayed(lambda: _send_out(hidden_states.contiguous(), weights, layout, route))
        values, local_weights, local_index = layout.view(received)
        assert local_weights is not None and local_index is not None
        local_index, local_weights = local_index.long(), local_weights.clone(memory_format=torch.contiguous_format)
        ctx.mark_non_differentiable(local_index)
        ctx.zeros = [
            functools.partial(torch.zeros, t.shape, dtype=t.dtype, device=t.device) for t in (values, local_weights)
        ]
        return values, local_index, local_weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_values: torch.Tensor | None, _grad_index, grad_weights: torch.Tensor | None):
        needs_values, needs_weights, _ = ctx.needs_input_grad
        # A gradient that this rank's experts do not have is zero: the other ranks wait for it all the same.
        grad_values, grad_weights = (
            zeros() if g is None else g for g, zeros in zip((grad_values, grad_weights), ctx.zeros)
        )
        grad_hidden, grad_top_k = _send_back(
            grad_values if needs_values else grad_values[:, :0], grad_weights if needs_weights else None, ctx.route
        )
        return grad_hidden if needs_values else None, grad_top_k, None


class _SendBack(torch.autograd.Function):
    """Phase 4."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, route: Route) -> torch.Tensor:
        ctx.route = route
        return replayed(lambda: _send_back(values, None, route)[0], handed_out=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: torch.Tensor):
        layout = RowLayout(grad_out.shape[1], grad_out.dtype)
        return _send_out(grad_out.contiguous(), None, layout, ctx.route), None
