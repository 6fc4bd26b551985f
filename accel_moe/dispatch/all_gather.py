"""Dispatch by all-gather, for few ranks of one node: every rank gets every token, and no host waits for a GPU.

With K experts a token and few ranks, nearly every rank needs nearly every token (K 8: 99.6% of them at ep 2, 90% at ep
4). Sending all of them then costs no more than sending the needed ones, nothing has to be counted, placed or packed,
and every size is known before the router has run:

    1. agree      each rank tells its tokens, free memory and kind of rows    between hosts, in microseconds
    2. out        all-gather of rows with their indices and weights           collective, beside the caller's work
                  each rank keeps the slots of its own experts; the experts function runs
    3. combine    reduce-scatter of the weighted sums                         collective

Out and combine are each other's transpose, so each is the other's backward; the routing weights' gradients have a
reduce-scatter of their own. Backward overlaps too: the all-gather of output gradients runs beside the caller's work,
the reduce-scatter of input gradients beside the weight-gradient GEMMs, if the experts function calls `on_input_grads`.
Ranks with fewer tokens than the most send rows without an expert in addition. The collective sums over ranks, in the
rows' dtype and in the same order every time.

The host does not know how many (row, expert) pairs came when it launches the experts. `Dispatched.num_pairs` is then a
DeferredCount, and an experts function makes room for K pairs of every row. In backward the number is known, unless the
forward was run again just before, exchange included: then the host waits for it.

After Megatron-LM's MoEAllGatherTokenDispatcher (megatron/core/transformer/moe/token_dispatcher.py), which recommends it
for a large K over few ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from accel_moe.dispatch import kinds, memory, rows
from accel_moe.dispatch.base import NO_OVERLAP, Dispatched, Overlap, RoutedTokens
from accel_moe.dispatch.collectives import gather_rows, sum_rows
from accel_moe.dispatch.host_all_gather import LARGEST, HostAllGather, host_all_gather_of
from accel_moe.dispatch.replay import replayed
from accel_moe.dispatch.rows import RowLayout, Rows
from accel_moe.kernels.deferred_count import DeferredCount, copied_to_host
from accel_moe.mesh import host_timeout

_MIB = 2**20


class Link(Protocol):
    """How the rows of a group travel. Both methods are collectives over it, and what they start is awaited in order."""

    def outbox(self, gathered: torch.Tensor) -> torch.Tensor:
        """[n, ...], where this rank's rows are best written before `gather` sends them to gathered [ep * n, ...]. Its
        `gather` comes next on the link."""
        ...

    def gather(self, own: torch.Tensor, gathered: torch.Tensor) -> Awaited:
        """own [n, ...] of every rank to gathered [ep * n, ...], rank-major. Both contiguous."""
        ...

    def sum(self, rows: torch.Tensor) -> tuple[torch.Tensor, Awaited]:
        """The transpose: rows [ep * n, ...], contiguous, to [n, ...]."""
        ...


class Awaited(Protocol):
    """Rows under way."""

    def wait(self) -> None: ...


class GroupLink:
    """By the group's own collectives."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group

    def outbox(self, gathered: torch.Tensor) -> torch.Tensor:
        return gathered.view(dist.get_world_size(self._group), -1, *gathered.shape[1:])[dist.get_rank(self._group)]

    def gather(self, own: torch.Tensor, gathered: torch.Tensor) -> Awaited:
        return gather_rows(own, gathered, self._group)

    def sum(self, rows: torch.Tensor) -> tuple[torch.Tensor, Awaited]:
        return sum_rows(rows, self._group)


@dataclass(frozen=True)
class GatherRoute:
    """What the ranks agreed on.

    Attributes:
        tokens: of each rank.
        rank: ours.
        free_bytes: of the rank that has the fewest, once the caller's other work has taken its share.
        capacity_bytes: of the rank that has the least memory, free or not: the same at every forward.
        link: how rows travel.
    """

    tokens: tuple[int, ...]
    rank: int
    free_bytes: int
    capacity_bytes: int
    link: Link

    @property
    def own(self) -> int:
        return self.tokens[self.rank]

    @property
    def rows(self) -> int:
        """Of each rank, filled up: at least one, so that a group without tokens runs the same ops."""
        return max(1, *self.tokens)

    @property
    def received(self) -> int:
        """R."""
        return self.rows * len(self.tokens)


class AllGatherDispatcher:
    """See `accel_moe.dispatch.base.Dispatcher` for the contract of both methods.

    Raises:
        ValueError: the group's ranks share no memory: they are on several nodes.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int):
        board = self.board(group)
        if board is None:
            raise ValueError(
                "moe_dispatcher='all_gather' needs an ep group of one node, whose ranks share memory (/dev/shm); found "
                "one that does not. Use moe_dispatcher='auto' or 'all_to_all'."
            )
        self.group = group
        self._link: Link = GroupLink(group)
        self._board = board
        self._rank = dist.get_rank(group)
        self._num_experts = num_experts
        self._num_local_experts = num_experts // dist.get_world_size(group)

    @staticmethod
    def board(group: dist.ProcessGroup) -> HostAllGather | None:
        """Of the group; None where its ranks share no memory. A collective over the group."""
        return host_all_gather_of(group, 4, host_timeout())

    def dispatch(self, tokens: RoutedTokens, work: Overlap = NO_OVERLAP) -> Dispatched:
        kind = kinds.kind_of(*tokens)
        route = replayed(lambda: self.agree(tokens.rows, kind, work.bytes_of_weights))
        self.check_fits(route, tokens, work)
        return self.send(route, tokens, work)

    def agree(self, hidden_states: torch.Tensor, kind: kinds.Kind, bytes_of_weights: int) -> GatherRoute:
        device = hidden_states.device
        free = max(0, memory.free_bytes(device) - bytes_of_weights)
        mine = hidden_states.shape[0], free // _MIB, memory.capacity_bytes(device) // _MIB, kinds.number_of(kind)
        tokens, free, capacity, kind_on = zip(*self._board.exchange(mine))
        kinds.check(kind_on, kind, self.group)
        return GatherRoute(tokens, self._rank, _least(free), _least(capacity), self._link)

    def most_bytes(self, route: GatherRoute, tokens: RoutedTokens, work: Overlap) -> int:
        """Memory that a rank takes at most for a moment, with K slots of every row in use: the rows, `bytes_per_pair`
        of each slot, and the experts' output."""
        bytes_per_row = tokens.rows.shape[1] * tokens.rows.element_size()
        return route.received * (bytes_per_row + tokens.index.shape[1] * (work.bytes_per_pair + bytes_per_row))

    def check_fits(self, route: GatherRoute, tokens: RoutedTokens, work: Overlap) -> None:
        """Raises torch.OutOfMemoryError, on every rank of the group, where a rank has less than that free."""
        needed = self.most_bytes(route, tokens, work)
        if needed > route.free_bytes:
            raise torch.OutOfMemoryError(
                f"An exchange by all-gather makes room for all {tokens.index.shape[1]} slots of {route.received} rows "
                f"on each rank, about {needed / 2**30:.2f} GiB; a rank of the ep group has "
                f"{route.free_bytes / 2**30:.2f} GiB free. Use moe_dispatcher: all_to_all, set "
                f"moe_dispatch_chunk_tokens to less than the {route.own} tokens of this batch, or use a smaller batch."
            )

    def send(self, route: GatherRoute, tokens: RoutedTokens, work: Overlap) -> Dispatched:
        """`dispatch`, once agreed."""
        hidden_states, top_k_index, top_k_weights = tokens
        layout = RowLayout(
            hidden_states.shape[1], hidden_states.dtype, top_k_index.shape[1], top_k_weights.dtype, with_index=True
        )
        started: list[Awaited] = []

        def out() -> torch.Tensor:
            received = layout.empty(route.received, hidden_states.device)
            mine = hidden_states.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
            own = route.link.outbox(received)
            rows.fill(layout.view(own), 0, route.rows, *mine, self._num_experts)
            started.append(route.link.gather(layout.wire(own), layout.wire(received)))
            return received

        with torch.no_grad():
            received = replayed(out)
        work.prepare_weights()
        for gather in started:
            gather.wait()
        with torch.no_grad():
            came = layout.view(received)
            first = route.rank * self._num_local_experts
            local_index, local_weights, pairs = rows.own_slots(came, first, self._num_local_experts)
            num_pairs = replayed(lambda: DeferredCount(_summed_later(pairs), 1 / dist.get_world_size(self.group)))
        grads = _InputGrads(route)
        values, local_weights = _Gathered.apply(
            hidden_states, top_k_weights, Rows(came.values, local_weights, local_index), self._num_local_experts, grads
        )
        return Dispatched(values, local_index, local_weights, num_pairs, route, grads.start)

    def combine(self, rows: torch.Tensor, sent: Dispatched, work: Overlap = NO_OVERLAP) -> torch.Tensor:
        return _Combine.apply(rows, sent.handle, work.for_backward())


def _least(mib: tuple[int, ...]) -> int:
    return memory.UNKNOWN if min(mib) == LARGEST else min(mib) * _MIB


def _summed_later(parts: torch.Tensor) -> Callable[[], int]:
    wait = copied_to_host(parts)
    return functools.cache(lambda: sum(wait()))


class _InputGrads:
    """The gradients of a dispatch's rows and weights, reduce-scattered early and taken by its backward."""

    def __init__(self, route: GatherRoute):
        self._route = route
        self._started: list[tuple[torch.Tensor, torch.Tensor, Awaited]] = []

    def start(self, grad_values: torch.Tensor, grad_weights: torch.Tensor) -> None:
        """Dispatched.on_input_grads."""
        # the small one first: behind the large one it would arrive after it
        self._started = [
            (gradient, *self._route.link.sum(gradient))
            for gradient in (grad_weights, grad_values)
            if gradient.shape[0] == self._route.received  # without elements where it is not needed
        ]

    def take(self, gradient: torch.Tensor, sentinels: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        """[R, ...] to [T, ...]: the sum over ranks, started already if `start` got this very tensor.

        sentinels: slots whose gradient is not to be read, asked for where nobody said that they hold zeros.
        """
        started = (
            (total, work)
            for sent, total, work in self._started
            if sent.data_ptr() == gradient.data_ptr() and sent.shape == gradient.shape
        )
        found = next(started, None)
        if found is None:
            gradient = gradient if sentinels is None else gradient.masked_fill(sentinels(), 0)
            found = self._route.link.sum(gradient.contiguous())
        total, work = found
        work.wait()
        return total[: self._route.own]

    def forget(self) -> None:
        for _, _, work in self._started:
            work.wait()  # also for one that was not taken: its input may be freed now
        self._started = []


class _Gathered(torch.autograd.Function):
    """The rows and weights that came, as if computed from ours; the way back of their gradients."""

    @staticmethod
    def forward(ctx, hidden_states, top_k_weights, came: Rows, sentinel: int, grads: _InputGrads):
        values, weights, local_index = came
        assert weights is not None and local_index is not None
        ctx.grads, ctx.sentinel = grads, sentinel
        ctx.zeros = [functools.partial(torch.zeros, t.shape, dtype=t.dtype, device=t.device) for t in (values, weights)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(local_index)
        out = values.view_as(values), weights.view_as(weights)
        # an experts function then computes, and sends, no gradient that nobody needs
        ctx.mark_non_differentiable(*(t for t, need in zip(out, ctx.needs_input_grad) if not need))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_values: torch.Tensor | None, grad_weights: torch.Tensor | None):
        needs_values, needs_weights, *_ = ctx.needs_input_grad
        (local_index,) = ctx.saved_tensors
        grads: _InputGrads = ctx.grads
        # A gradient that this rank's experts do not have is zero: the other ranks wait for it all the same.
        grad_values, grad_weights = (
            zeros() if g is None else g for g, zeros in zip((grad_values, grad_weights), ctx.zeros)
        )
        # in the order of `start`: another rank may have started its own, where this one's experts function did not
        grad_top_k = grads.take(grad_weights, lambda: local_index >= ctx.sentinel) if needs_weights else None
        grad_hidden = grads.take(grad_values) if needs_values else None
        grads.forget()
        return grad_hidden, grad_top_k, None, None, None


class _Combine(torch.autograd.Function):
    """Each token's weighted sums of every rank, added up on the token's rank."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, route: GatherRoute, overlap: Callable[[], None] | None) -> torch.Tensor:
        ctx.route, ctx.overlap = route, overlap

        def summed() -> torch.Tensor:
            total, work = route.link.sum(values.contiguous())
            work.wait()
            # not a view: a model may change it in place
            return total if route.own == route.rows else total[: route.own].clone()

        return replayed(summed, handed_out=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: torch.Tensor):
        route: GatherRoute = ctx.route
        own = grad_out.contiguous()
        if route.own < route.rows:
            own = torch.cat([own, own.new_zeros(route.rows - route.own, own.shape[1])])
        gathered = own.new_empty(route.received, own.shape[1])
        work = route.link.gather(own, gathered)
        if ctx.overlap is not None:
            ctx.overlap()
        work.wait()
        return gathered, None, None
