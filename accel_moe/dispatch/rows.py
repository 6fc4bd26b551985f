"""The local halves of an exchange: count copies, place them, pack rows before it, sum rows after it.

A *copy* is one (token, rank) pair: the row that token sends to that rank, however many of its experts live there.
Copies are numbered by the rank they go to, the other ranks in order and our own last, so that leaving copies come
first; our own rows go straight to where the received ones lie, and no collective touches them.

On a GPU each function is one kernel (rows_triton.py); here is the same in plain torch, for CPUs and to check
the kernels against. T tokens, K top-k, H hidden.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGN = 16  # bytes: what a TMA copy and a vector load ask of every part
_ALIGN_ROW = 64  # and of a row: Triton takes a stride that 16 elements divide for aligned


class Rows(NamedTuple):
    """n rows: values [n, H], routing weights [n, K], expert numbers [n, K] int32 (the number of local experts for a
    slot that belongs to another rank). Each may be a strided view."""

    values: Tensor
    weights: Tensor | None = None
    index: Tensor | None = None


@dataclass(frozen=True)
class RowLayout:
    """How a row travels: its H values, then its K weights and its K expert numbers, where it has them; each part at a
    multiple of 16 bytes, the row at one of 64. One collective brings all of it.

    Attributes:
        weights_dtype: None when rows carry neither weights nor numbers.
    """

    hidden: int
    dtype: torch.dtype
    top_k: int = 0
    weights_dtype: torch.dtype | None = None
    with_index: bool = False

    @functools.cached_property
    def _weights_at(self) -> int:
        return _aligned(self.hidden * self.dtype.itemsize, _ALIGN)

    @functools.cached_property
    def _index_at(self) -> int:
        return self._weights_at + _aligned(
            self.top_k * self.weights_dtype.itemsize if self.weights_dtype else 0, _ALIGN
        )

    @functools.cached_property
    def nbytes(self) -> int:
        return _aligned(self._index_at + (4 * self.top_k if self.with_index else 0), _ALIGN_ROW)

    @property
    def width(self) -> int:
        """Of a row, in elements of `dtype`: H alone needs no alignment."""
        return self.nbytes // self.dtype.itemsize if self.weights_dtype else self.hidden

    def empty(self, rows: int, device: torch.device) -> Tensor:
        """[rows, width] in `dtype`."""
        return torch.empty(rows, self.width, dtype=self.dtype, device=device)

    def wire(self, buffer: Tensor) -> Tensor:
        """A buffer as a collective should see it: bytes, where other things lie between the values."""
        return buffer if self.weights_dtype is None else buffer.view(torch.uint8)

    def view(self, buffer: Tensor) -> Rows:
        """The parts of a buffer that `empty` made, or of some of its rows."""
        if self.weights_dtype is None:
            return Rows(buffer)
        weights = _columns(buffer, self.weights_dtype, self._weights_at, self.top_k)
        index = _columns(buffer, torch.int32, self._index_at, self.top_k) if self.with_index else None
        return Rows(buffer[:, : self.hidden], weights, index)


def count(index: Tensor, experts_per_rank: int, ranks: int, free_bytes: int) -> tuple[Tensor, Tensor]:
    """Of index[T, K], contiguous: [ranks, 3] int64, the rows and the (row, expert) pairs for each rank, and free_bytes,
    whatever that says; and what `place` needs besides. No host sync."""
    if index.is_cuda:
        from accel_moe.dispatch import rows_triton

        return rows_triton.count(index, experts_per_rank, ranks, free_bytes)
    destination = _destination(index, experts_per_rank, ranks)
    needed = torch.zeros(index.shape[0], ranks + 1, dtype=torch.bool, device=index.device)
    needed = needed.scatter_(1, destination, True)[:, :ranks]
    pairs = torch.bincount(destination.reshape(-1), minlength=ranks + 1)[:ranks]
    return torch.stack([needed.sum(0), pairs, torch.full_like(pairs, free_bytes)], dim=1), needed


def place(index: Tensor, counted: Tensor, experts_per_rank: int, ranks: int, own_rank: int) -> tuple[Tensor, Tensor]:
    """The copies' numbers.

    Args:
        counted: the second value of `count`.

    Returns:
        slot [T, ranks] int32, the copy of each token for each rank, -1 where it needs none; and copy
        [T * min(ranks, K)] int32, token * ranks + rank of each copy, undefined past the last.
    """
    if index.is_cuda:
        from accel_moe.dispatch import rows_triton

        return rows_triton.place(index, counted, experts_per_rank, ranks, own_rank)
    tokens, top_k = index.shape
    order = torch.tensor([*(r for r in range(ranks) if r != own_rank), own_rank], device=index.device)
    rank, token = counted[:, order].t().nonzero(as_tuple=True)
    rank = order[rank]
    copy = torch.zeros(tokens * min(ranks, top_k), dtype=torch.int32, device=index.device)
    copy[: token.numel()] = token * ranks + rank
    slot = torch.full((tokens, ranks), -1, dtype=torch.int32, device=index.device)
    slot[token, rank] = torch.arange(token.numel(), dtype=torch.int32, device=index.device)
    return slot, copy


def pack(
    source: Tensor,
    copy: Tensor | None,
    index: Tensor | None,
    weights: Tensor | None,
    sent: Rows,
    own: Rows,
    experts_per_rank: int,
    ranks: int,
) -> None:
    """Fills `sent` with the first rows and `own` with the others.

    Args:
        source: [T, H], strided by rows.
        copy: of `place`, for rows picked by token; None for rows of source as they lie.
        index: [T, K], for the expert numbers on the rank each row goes to; None when rows carry none.
        weights: [T, K], contiguous; None when rows carry none. With index, 0 in slots of other ranks.
    """
    if source.is_cuda:
        from accel_moe.dispatch import rows_triton

        return rows_triton.pack(source, copy, index, weights, sent, own, experts_per_rank, ranks)
    first = 0
    for part in (sent, own):
        rows = slice(first, first := first + part.values.shape[0])
        token, rank = (rows, 0) if copy is None else (copy[rows].long() // ranks, copy[rows, None] % ranks)
        part.values.copy_(source[token])
        if weights is None or part.weights is None:
            continue
        part.weights.copy_(weights[token])
        if index is not None and part.index is not None:
            local = index[token] - rank * experts_per_rank
            ours = (local >= 0) & (local < experts_per_rank)
            part.index.copy_(torch.where(ours, local, experts_per_rank))
            part.weights.masked_fill_(~ours, 0.0)


def fill(rows: Rows, first: int, count: int, source: Tensor, index: Tensor, weights: Tensor, num_experts: int) -> None:
    """Rows first .. first + count become the tokens of source [T, H], index [T, K] and weights [T, K], contiguous;
    those past the T tokens zeros. Slots without an expert get the number num_experts and the weight 0."""
    assert rows.index is not None and rows.weights is not None
    if source.is_cuda:
        from accel_moe.dispatch import rows_triton

        return rows_triton.fill(
            (rows.values, rows.weights, rows.index), first, count, source, index, weights, num_experts
        )
    tokens, rest = slice(first, first + len(source)), slice(first + len(source), first + count)
    routed = (index >= 0) & (index < num_experts)
    rows.values[tokens] = source
    rows.values[rest] = 0
    rows.weights[tokens] = torch.where(routed, weights, 0.0)
    rows.weights[rest] = 0
    rows.index[tokens] = torch.where(routed, index, num_experts).to(torch.int32)
    rows.index[rest] = num_experts


def own_slots(rows: Rows, first: int, experts_per_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows whose expert numbers count all ranks' experts, the slots of experts first .. first + experts_per_rank.

    Returns:
        [R, K] int64, those experts numbered from 0, experts_per_rank in every other slot; [R, K], their weights, 0 in
        the others; and integers whose sum is how many slots they are.
    """
    assert rows.index is not None and rows.weights is not None
    if rows.index.is_cuda:
        from accel_moe.dispatch import rows_triton

        return rows_triton.own_slots(rows.index, rows.weights, first, experts_per_rank)
    local = rows.index.long() - first
    ours = (local >= 0) & (local < experts_per_rank)
    local_index = torch.where(ours, local, experts_per_rank)
    return local_index, torch.where(ours, rows.weights, 0.0), ours.sum(1)


def combine(
    returned: Rows, own: Rows, slot: Tensor, index: Tensor, experts_per_rank: int
) -> tuple[Tensor, Tensor | None]:
    """Each token's copies summed, in rank order, in fp32 or better (no atomics: the same bits every time); and, where
    rows carry weights, each slot's weight as the rank it went to gave it, 0 for a slot without an expert.

    Args:
        returned, own: the copies in order: those that came back, and those that never left.
        slot: [T, ranks] of `place`.
        index: [T, K], which says where each slot went.

    Returns:
        [T, H] in the values' dtype, and [T, K] or None.
    """
    if slot.is_cuda and returned.values.dtype != torch.float64:  # which the kernel would sum in fp32
        from accel_moe.dispatch import rows_triton

        return rows_triton.combine(returned[:2], own[:2], slot, index, experts_per_rank)
    values = torch.cat([returned.values, own.values, own.values.new_zeros(1, own.values.shape[1])])
    total = sum(values[slot[:, r]].to(torch.promote_types(values.dtype, torch.float32)) for r in range(slot.shape[1]))
    assert isinstance(total, Tensor)
    if returned.weights is None or own.weights is None:
        return total.to(values.dtype), None
    weights = torch.cat([returned.weights, own.weights, own.weights.new_zeros(1, index.shape[1])])
    nowhere = slot.new_full((slot.shape[0], 1), -1)
    row = torch.cat([slot, nowhere], dim=1).long().gather(1, _destination(index, experts_per_rank, slot.shape[1]))
    return total.to(values.dtype), weights.gather(0, row.remainder_(len(weights)))


def sum_over_ranks(own: Tensor, others: Tensor, own_rank: int, total: Tensor) -> None:
    """total [n, ...] becomes own [n, ...] + others [ranks - 1, n, ...], added in the order of the ranks, in fp32 or
    better, and rounded once. All contiguous."""
    if own.is_cuda and len(others) and own.dtype != torch.float64:  # which the kernel would sum in fp32
        from accel_moe.dispatch import rows_triton

        return rows_triton.sum_over_ranks(own, others, own_rank, total)
    dtype = torch.promote_types(own.dtype, torch.float32)
    parts = [*others[:own_rank], own, *others[own_rank:]]
    total.copy_(functools.reduce(torch.add, [part.to(dtype) for part in parts]))


def _destination(index: Tensor, experts_per_rank: int, ranks: int) -> Tensor:
    """[T, K] int64: the rank of each slot; `ranks` for one without an expert."""
    rank = (index.long() // experts_per_rank).clamp_(max=ranks)
    return rank.masked_fill_(rank < 0, ranks)


def _aligned(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to


def _columns(buffer: Tensor, dtype: torch.dtype, first_byte: int, columns: int) -> Tensor:
    """Columns of a contiguous buffer, read as another dtype."""
    first = first_byte // dtype.itemsize
    return buffer.view(dtype)[:, first : first + columns]
