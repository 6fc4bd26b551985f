"""Dispatch by all-to-all, each row sent once per rank.

A token whose top-k falls on one rank several times travels there once, together with its local indices and
routing weights; the owning rank computes the weighted sum over its own experts and returns one row. So what
travels is (token, rank) pairs, not (token, expert) pairs: about 0.27 of the bytes at ep 2 and K 8.

One layer's forward, in numbered phases:

    1. route      which ranks each token needs                                     local, no sync
    2. counts     all-gather of (rows, pairs) per destination, and of free memory  collective, THE host sync
    3. rows       all-to-all of hidden_states                                      collective
    4. slots      all-to-all of local indices and routing weights, one packed byte buffer   collective
       ... experts ...
    5. home       all-to-all of the weighted sums, then a sum over each token's copies      collective

"Send rows out" (3) and "bring rows home" (5) are each other's transpose, so each is the other's backward, and
dispatch and combine are the same two functions twice. The backward of 4 brings the routing weights' gradients
home and picks, for each slot, the value from the rank that computed it; what an experts function left in its
sentinel slots is never read.

Nothing here branches on a count around a collective: ranks with no token, or none received, run the same ops.

One row per (token, rank) rather than per (token, expert) follows DeepEP (deepseek-ai/DeepEP, README,
"dispatch"), whose dispatch also carries top-k indices and weights beside the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from accel_moe.dispatch import memory
from accel_moe.dispatch.base import Dispatched
from accel_moe.dispatch.collectives import exchange_counts, exchange_rows
from accel_moe.dispatch.keep import remember


@dataclass(frozen=True)
class Route:
    """Where each token's copies sit in the exchange. S rows sent, R rows received.

    Attributes:
        send_token: [S] int64, the token of each row sent, grouped by destination, ascending within one.
        slot: [T, ep] int64, the row of send_token that holds token t's copy for rank r; S where there is none.
        destination: [T, K] int64, the rank that owns each chosen expert; ep for a slot without an expert.
    """

    send_token: torch.Tensor
    slot: torch.Tensor
    destination: torch.Tensor
    send_counts: list[int]
    receive_counts: list[int]
    group: dist.ProcessGroup

    @property
    def num_received(self) -> int:
        return sum(self.receive_counts)


class AllToAllDispatcher:
    """See `accel_moe.dispatch.base.Dispatcher` for the contract of both methods."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int):
        self.group = group
        self.ep = dist.get_world_size(group)
        self.ep_rank = dist.get_rank(group)
        assert num_experts % self.ep == 0, (num_experts, self.ep)
        self.num_local_experts = num_experts // self.ep

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *,
        bytes_per_pair: int = 0,
    ) -> Dispatched:
        bytes_per_row = hidden_states.shape[1] * hidden_states.element_size()
        route, num_pairs = remember(lambda: self._route(top_k_index, bytes_per_row, bytes_per_pair))
        rows = _SendRows.apply(hidden_states, route)
        local_index, local_weights = _SendSlots.apply(top_k_weights, top_k_index, route, self.num_local_experts)
        return Dispatched(rows, local_index, local_weights, num_pairs, handle=route)

    def combine(self, rows: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        return _BringHome.apply(rows, dispatched.handle)

    @torch.no_grad()
    def _route(self, top_k_index: torch.Tensor, bytes_per_row: int, bytes_per_pair: int) -> tuple[Route, int]:
        tokens, device = top_k_index.shape[0], top_k_index.device
        destination = (top_k_index.long() // self.num_local_experts).clamp_(max=self.ep)
        needed = torch.zeros(tokens, self.ep + 1, dtype=torch.bool, device=device)
        needed.scatter_(1, destination, True)
        needed_by_rank = needed[:, : self.ep].t()  # [ep, T]
        ranks = torch.arange(self.ep, device=device)
        pairs = (destination.reshape(-1, 1) == ranks).sum(0)
        free = torch.full_like(pairs, memory.free_bytes(device))
        ours = torch.stack([needed_by_rank.sum(1), pairs, free], dim=1)
        counts = exchange_counts(ours, self.group).tolist()  # [from][to][3]; host sync: sizes are Python integers
        rows_to = [sum(of[to][0] for of in counts) for to in range(self.ep)]
        pairs_to = [sum(of[to][1] for of in counts) for to in range(self.ep)]
        free_on = [of[0][2] for of in counts]
        memory.check_fits(
            rows_to, pairs_to, free_on, bytes_per_row=bytes_per_row, bytes_per_pair=bytes_per_pair, tokens=tokens
        )
        send_counts = [to[0] for to in counts[self.ep_rank]]
        receive_counts = [of[self.ep_rank][0] for of in counts]
        num_pairs = pairs_to[self.ep_rank]

        sent = sum(send_counts)
        position = needed_by_rank.reshape(-1).cumsum(0).sub_(1).view(self.ep, tokens)
        slot = torch.where(needed_by_rank, position, sent)
        # One spare entry takes the writes of all (token, rank) pairs that are not sent.
        send_token = torch.empty(sent + 1, dtype=torch.long, device=device)
        token = torch.arange(tokens, device=device).expand(self.ep, tokens)
        send_token.scatter_(0, slot.reshape(-1), token.reshape(-1))
        route = Route(send_token[:sent], slot.t(), destination, send_counts, receive_counts, self.group)
        return route, num_pairs


def _send_rows(tokens: torch.Tensor, route: Route) -> torch.Tensor:
    """[T, H] to [max(R, 1), H]: phase 3. The one row of a rank that received nothing is zero."""
    received = exchange_rows(tokens[route.send_token], route.send_counts, route.receive_counts, route.group)
    return received if route.num_received else received.new_zeros((1, *received.shape[1:]))


def _send_slots(
    top_k_weights: torch.Tensor, top_k_index: torch.Tensor, route: Route, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase 4. Per row received: its K local expert numbers (e where the slot belongs to another rank) and weights."""
    device, k = top_k_weights.device, top_k_weights.shape[1]
    to_rank = torch.repeat_interleave(
        torch.arange(len(route.send_counts), device=device),
        torch.tensor(route.send_counts, device=device),
        output_size=sum(route.send_counts),
    )[:, None]
    ours = route.destination[route.send_token] == to_rank
    index = torch.where(ours, top_k_index[route.send_token].long() - to_rank * num_local_experts, num_local_experts)
    weights = torch.where(ours, top_k_weights[route.send_token], 0.0).to(top_k_weights.dtype)
    packed = torch.cat([_as_bytes(index.int()), _as_bytes(weights)], dim=1)
    packed = exchange_rows(packed, route.send_counts, route.receive_counts, route.group)
    index = _from_bytes(packed[:, : 4 * k], torch.int32).long()
    weights = _from_bytes(packed[:, 4 * k :], top_k_weights.dtype)
    if not route.num_received:
        index = index.new_full((1, k), num_local_experts)
        weights = weights.new_zeros((1, k))
    return index, weights


def _bring_home(rows: torch.Tensor, route: Route) -> torch.Tensor:
    """[max(R, 1), H] to [T, H]: phase 5. Each token's copies are added in rank order, in fp32: no atomics, so the
    same bits every time."""
    returned = exchange_rows(
        rows[: route.num_received], route.receive_counts, route.send_counts, route.group, zero_rows=1
    )
    home = returned[route.slot[:, 0]]
    if route.slot.shape[1] == 1:
        return home
    total = home.to(torch.promote_types(home.dtype, torch.float32))
    for copies in route.slot.unbind(1)[1:]:
        total = total + returned[copies]  # slot S is the row of zeros
    return total.to(rows.dtype)


class _SendRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, route: Route) -> torch.Tensor:
        ctx.route = route
        return remember(lambda: _send_rows(hidden_states, route))

    @staticmethod
    def backward(ctx, grad_rows: torch.Tensor):
        return _bring_home(grad_rows, ctx.route), None


class _BringHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, route: Route) -> torch.Tensor:
        ctx.route = route
        return remember(lambda: _bring_home(rows, route), handed_out=True)

    @staticmethod
    def backward(ctx, grad_home: torch.Tensor):
        return _send_rows(grad_home, ctx.route), None


class _SendSlots(torch.autograd.Function):
    """Phase 4, and the way back of the routing weights' gradient."""

    @staticmethod
    def forward(ctx, top_k_weights: torch.Tensor, top_k_index: torch.Tensor, route: Route, num_local_experts: int):
        ctx.route = route
        index, weights = remember(lambda: _send_slots(top_k_weights, top_k_index, route, num_local_experts))
        ctx.mark_non_differentiable(index)
        return index, weights

    @staticmethod
    def backward(ctx, _grad_index, grad_weights: torch.Tensor):
        route: Route = ctx.route
        returned = exchange_rows(
            grad_weights[: route.num_received], route.receive_counts, route.send_counts, route.group, zero_rows=1
        )
        # The copy of token t that went to the owner of slot k; the zero row for a slot without an expert.
        no_copy = route.slot.new_full((route.slot.shape[0], 1), returned.shape[0] - 1)
        row = torch.cat([route.slot, no_copy], dim=1).gather(1, route.destination)
        return returned.gather(0, row), None, None, None


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _from_bytes(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # clone, not contiguous(): a single row counts as contiguous with any stride, which view(dtype) then refuses.
    return packed.clone(memory_format=torch.contiguous_format).view(dtype)
