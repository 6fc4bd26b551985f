"""The local halves of an exchange between ranks, on a GPU: counting, placing, packing and summing rows.

Each function is one kernel and has a twin in plain torch, in dispatch/rows.py, which says what it computes; here is
how. They exist for the launches as much as for the bytes: what a handful of torch operations do in tens of launches
keeps a GPU waiting for its host at every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from accel_moe.kernels.arithmetic import cdiv, power_of_2
from accel_moe.kernels.cached_launch import cached_launch

_BLOCK = 2048  # columns of a row at once


# ---- Kernels


@triton.jit
def destinations(
    index_ptr, token, num_tokens, experts_per_rank, TOP_K: tl.constexpr, K_PAD: tl.constexpr, TOKENS: tl.constexpr
):
    """[TOKENS, K_PAD]: the rank of each slot; -1 outside of the tokens, the number of ranks or more for no expert."""
    k = tl.arange(0, K_PAD)
    mask = (token < num_tokens)[:, None] & (k < TOP_K)[None, :]
    index = tl.load(index_ptr + token[:, None] * TOP_K + k[None, :], mask=mask, other=-1)
    # a number too large for int32 must not come out as a rank
    return tl.where(index < 0, -1, tl.minimum(index // experts_per_rank, 2147483647)).to(tl.int32)


@cached_launch
@triton.jit(do_not_specialize=["num_tokens", "free_bytes"])
def count_copies(
    index_ptr,
    count_ptr,
    num_tokens,
    experts_per_rank,
    ranks,
    free_bytes,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Per block of tokens and rank: rows, pairs, and (block 0 only, for the sum over blocks) the free bytes."""
    block = tl.program_id(0)
    token = block * TOKENS + tl.arange(0, TOKENS)
    destination = destinations(index_ptr, token, num_tokens, experts_per_rank, TOP_K, K_PAD, TOKENS)
    for rank in range(ranks):
        hits = (destination == rank).to(tl.int32)
        count = count_ptr + (block * ranks + rank) * 3
        tl.store(count, tl.sum(tl.max(hits, axis=1), axis=0).to(tl.int64))
        tl.store(count + 1, tl.sum(tl.sum(hits, axis=1), axis=0).to(tl.int64))
        tl.store(count + 2, tl.where(block == 0, free_bytes, 0).to(tl.int64))


@cached_launch
@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "own_rank"])
def place_copies(
    index_ptr,
    count_ptr,
    slot_ptr,
    copy_ptr,
    num_tokens,
    num_blocks,
    experts_per_rank,
    ranks,
    own_rank,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Numbers the copies: by rank (the others in order, our own last), by token within one."""
    block = tl.program_id(0)
    lane = tl.arange(0, TOKENS)
    token = block * TOKENS + lane
    destination = destinations(index_ptr, token, num_tokens, experts_per_rank, TOP_K, K_PAD, TOKENS)
    blocks = tl.arange(0, BLOCKS)
    base = tl.zeros((), tl.int64)
    for i in range(ranks):
        other = tl.where(i < own_rank, i, i + 1)
        rank = tl.where(i == ranks - 1, own_rank, other)
        counts = tl.load(count_ptr + (blocks * ranks + rank) * 3, mask=blocks < num_blocks, other=0)
        before = tl.sum(tl.where(blocks < block, counts, 0), axis=0)
        needed = tl.max((destination == rank).to(tl.int32), axis=1)
        position = (base + before).to(tl.int32) + tl.cumsum(needed, axis=0) - needed
        tl.store(slot_ptr + token * ranks + rank, tl.where(needed > 0, position, -1), mask=token < num_tokens)
        tl.store(copy_ptr + position, token * ranks + rank, mask=needed > 0)
        base += tl.sum(counts, axis=0)


@dataclass(frozen=True)
class Parts:
    """Which parts a packed row has. A constant of `pack_rows`.

    Attributes:
        gather: rows are picked by token.
        weights, index: a row has routing weights, and expert numbers.
        k_pad: top_k, rounded up to a power of two.
        block: values copied at once.
    """

    gather: bool
    weights: bool
    index: bool
    top_k: int
    k_pad: int
    block: int


@cached_launch
@triton.jit(do_not_specialize=["num_sent"])
def pack_rows(
    source_ptr,
    copy_ptr,
    index_ptr,
    weight_ptr,
    sent_ptr,
    sent_weight_ptr,
    sent_index_ptr,
    own_ptr,
    own_weight_ptr,
    own_index_ptr,
    num_sent,
    hidden,
    ranks,
    experts_per_rank,
    source_stride,
    stride,
    weight_stride,
    index_stride,
    PARTS: tl.constexpr,
):
    """One row: its values, and where asked for its routing weights and its expert numbers on the rank it goes to."""
    row = tl.program_id(0).to(tl.int64)
    token, rank = row, 0
    if PARTS.gather:
        copy = tl.load(copy_ptr + row)
        token, rank = (copy // ranks).to(tl.int64), copy % ranks
    own = row - num_sent
    leaves, stays = (row < num_sent).to(tl.int32), (row >= num_sent).to(tl.int32)
    for start in range(0, hidden, PARTS.block):
        cols = start + tl.arange(0, PARTS.block)
        values = tl.load(source_ptr + token * source_stride + cols, mask=cols < hidden, other=0.0)
        tl.store(sent_ptr + row * stride + cols, values, mask=cols < hidden * leaves)
        tl.store(own_ptr + own * stride + cols, values, mask=cols < hidden * stays)
    if PARTS.weights:
        k = tl.arange(0, PARTS.k_pad)
        mask = k < PARTS.top_k
        weights = tl.load(weight_ptr + token * PARTS.top_k + k, mask=mask, other=0.0)
        if PARTS.index:
            local = tl.load(index_ptr + token * PARTS.top_k + k, mask=mask, other=0) - rank * experts_per_rank
            ours = (local >= 0) & (local < experts_per_rank)
            weights = tl.where(ours, weights, 0.0).to(weight_ptr.dtype.element_ty)
            local = tl.where(ours, local, experts_per_rank).to(tl.int32)
            tl.store(sent_index_ptr + row * index_stride + k, local, mask=k < PARTS.top_k * leaves)
            tl.store(own_index_ptr + own * index_stride + k, local, mask=k < PARTS.top_k * stays)
        tl.store(sent_weight_ptr + row * weight_stride + k, weights, mask=k < PARTS.top_k * leaves)
        tl.store(own_weight_ptr + own * weight_stride + k, weights, mask=k < PARTS.top_k * stays)


@cached_launch
@triton.jit(do_not_specialize=["num_sent"])
def sum_copies(
    returned_ptr,
    returned_weight_ptr,
    own_ptr,
    own_weight_ptr,
    slot_ptr,
    index_ptr,
    out_ptr,
    out_weight_ptr,
    num_sent,
    hidden,
    ranks,
    experts_per_rank,
    returned_stride,
    returned_weight_stride,
    own_stride,
    own_weight_stride,
    WEIGHTS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token, BLOCK columns: its copies in rank order, in fp32; and each slot's weight from the rank it went to."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in range(ranks):
        slot = tl.load(slot_ptr + token * ranks + rank).to(tl.int64)
        away = ((slot >= 0) & (slot < num_sent)).to(tl.int32)
        values = tl.load(returned_ptr + slot * returned_stride + cols, mask=cols < hidden * away, other=0.0)
        total += values.to(tl.float32)
        own, stays = slot - num_sent, (slot >= num_sent).to(tl.int32)
        values = tl.load(own_ptr + own * own_stride + cols, mask=cols < hidden * stays, other=0.0)
        total += values.to(tl.float32)
    tl.store(out_ptr + token * hidden + cols, total.to(out_ptr.dtype.element_ty), mask=cols < hidden)
    if WEIGHTS:
        if tl.program_id(1) == 0:
            k = tl.arange(0, K_PAD)
            index = tl.load(index_ptr + token * TOP_K + k, mask=k < TOP_K, other=-1)
            owner = index // experts_per_rank
            has_expert = (index >= 0) & (owner < ranks)
            row = tl.load(slot_ptr + token * ranks + owner, mask=has_expert, other=-1).to(tl.int64)
            back, kept = (row >= 0) & (row < num_sent), row >= num_sent
            weights = tl.load(returned_weight_ptr + row * returned_weight_stride + k, mask=back, other=0.0)
            weights += tl.load(own_weight_ptr + (row - num_sent) * own_weight_stride + k, mask=kept, other=0.0)
            tl.store(out_weight_ptr + token * TOP_K + k, weights, mask=k < TOP_K)


@cached_launch
@triton.jit(do_not_specialize=["num_tokens", "first"])
def fill_rows(
    source_ptr,
    index_ptr,
    weight_ptr,
    row_ptr,
    row_weight_ptr,
    row_index_ptr,
    num_tokens,
    first,
    hidden,
    sentinel,
    source_stride,
    row_stride,
    row_weight_stride,
    row_index_stride,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token's values, routing weights and expert numbers; past the last token zeros, without an expert."""
    token = tl.program_id(0).to(tl.int64)
    row = first + token
    there = (token < num_tokens).to(tl.int32)
    for start in range(0, hidden, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        values = tl.load(source_ptr + token * source_stride + cols, mask=cols < hidden * there, other=0.0)
        tl.store(row_ptr + row * row_stride + cols, values, mask=cols < hidden)
    k = tl.arange(0, K_PAD)
    index = tl.load(index_ptr + token * TOP_K + k, mask=k < TOP_K * there, other=-1)
    routed = (index >= 0) & (index < sentinel)
    weights = tl.load(weight_ptr + token * TOP_K + k, mask=routed, other=0.0)
    tl.store(row_weight_ptr + row * row_weight_stride + k, weights, mask=k < TOP_K)
    tl.store(row_index_ptr + row * row_index_stride + k, tl.where(routed, index, sentinel).to(tl.int32), mask=k < TOP_K)


@cached_launch
@triton.jit(do_not_specialize=["num_rows", "first"])
def keep_own_slots(
    index_ptr,
    weight_ptr,
    local_index_ptr,
    local_weight_ptr,
    pairs_ptr,
    num_rows,
    first,
    experts_per_rank,
    index_stride,
    weight_stride,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Slots of experts first.. first + experts_per_rank, numbered from 0, and how many they are in this block of rows;
    every other slot becomes a sentinel of weight 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, K_PAD)[None, :]
    mask = (row < num_rows)[:, None] & (k < TOP_K)
    row = row.to(tl.int64)[:, None]
    local = tl.load(index_ptr + row * index_stride + k, mask=mask, other=-1) - first
    ours = (local >= 0) & (local < experts_per_rank) & mask
    weights = tl.load(weight_ptr + row * weight_stride + k, mask=ours, other=0.0)
    tl.store(local_index_ptr + row * TOP_K + k, tl.where(ours, local, experts_per_rank).to(tl.int64), mask=mask)
    tl.store(local_weight_ptr + row * TOP_K + k, weights, mask=mask)
    tl.store(pairs_ptr + tl.program_id(0), tl.sum(tl.sum(ours.to(tl.int32), axis=1), axis=0))


# ---- Launches


@cached_launch
@triton.jit(do_not_specialize=["units", "own_rank"])
def sum_parts(
    own_ptr, others_ptr, total_ptr, units, own_rank, UNIT: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr
):
    """total = own + the others, in the order of the ranks, in fp32; of units * UNIT values each."""
    numel = units.to(tl.int64) * UNIT
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    own = tl.load(own_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in range(RANKS):
        is_own = tl.full((BLOCK,), rank, tl.int32) == own_rank
        place = rank - (rank > own_rank).to(tl.int64)
        other = tl.load(others_ptr + place * numel + at, mask=inside & ~is_own, other=0.0).to(tl.float32)
        total += tl.where(is_own, own, other)
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=inside)


def _tokens_per_block(tokens: int) -> int:
    return 64 if tokens <= 16384 else 256


def count(index: Tensor, experts_per_rank: int, ranks: int, free_bytes: int) -> tuple[Tensor, Tensor]:
    """dispatch.rows.count; what `place` needs besides is the counts per block of tokens."""
    (tokens, top_k), per_block = index.shape, _tokens_per_block(index.shape[0])
    blocks = max(1, cdiv(tokens, per_block))
    counts = torch.empty(blocks, ranks, 3, dtype=torch.long, device=index.device)
    count_copies[(blocks,)](
        index,
        counts,
        tokens,
        experts_per_rank,
        ranks,
        free_bytes,
        TOP_K=top_k,
        K_PAD=power_of_2(top_k),
        TOKENS=per_block,
    )
    return counts.sum(0), counts


def place(index: Tensor, counts: Tensor, experts_per_rank: int, ranks: int, own_rank: int) -> tuple[Tensor, Tensor]:
    tokens, top_k = index.shape
    blocks = counts.shape[0]
    slot = torch.empty(tokens, ranks, dtype=torch.int32, device=index.device)
    copy = torch.empty(tokens * min(ranks, top_k), dtype=torch.int32, device=index.device)
    if tokens:
        place_copies[(blocks,)](
            index,
            counts,
            slot,
            copy,
            tokens,
            blocks,
            experts_per_rank,
            ranks,
            own_rank,
            TOP_K=top_k,
            K_PAD=power_of_2(top_k),
            TOKENS=_tokens_per_block(tokens),
            BLOCKS=power_of_2(blocks),
        )
    return slot, copy


def pack(
    source: Tensor,
    copy: Tensor | None,
    index: Tensor | None,
    weights: Tensor | None,
    sent: tuple[Tensor, Tensor | None, Tensor | None],
    own: tuple[Tensor, Tensor | None, Tensor | None],
    experts_per_rank: int,
    ranks: int,
) -> None:
    rows = sent[0].shape[0] + own[0].shape[0]
    if not rows:
        return
    top_k = 1 if weights is None else weights.shape[1]
    nothing = source  # a pointer that is never followed
    s, o = ([nothing if t is None else t for t in side] for side in (sent, own))
    pack_rows[(rows,)](
        source,
        nothing if copy is None else copy,
        nothing if index is None else index,
        nothing if weights is None else weights,
        *s,
        *o,
        sent[0].shape[0],
        sent[0].shape[1],
        ranks,
        experts_per_rank,
        source.stride(0),
        *(t.stride(0) for t in s),  # both sides are of one layout
        PARTS=Parts(
            gather=copy is not None,
            weights=weights is not None,
            index=index is not None,
            top_k=top_k,
            k_pad=power_of_2(top_k),
            block=min(power_of_2(max(1, sent[0].shape[1])), _BLOCK),
        ),
        num_warps=4,
    )


def combine(
    returned: tuple[Tensor, Tensor | None],
    own: tuple[Tensor, Tensor | None],
    slot: Tensor,
    index: Tensor,
    experts_per_rank: int,
) -> tuple[Tensor, Tensor | None]:
    tokens, ranks = slot.shape
    (values, weights), (own_values, own_weights) = returned, own
    hidden = values.shape[1]
    out = values.new_empty(tokens, hidden)
    out_weights = None if weights is None else weights.new_empty(index.shape)
    if tokens:
        with_weights = weights is not None and own_weights is not None
        block = min(power_of_2(max(1, hidden)), _BLOCK)
        sum_copies[(tokens, max(1, cdiv(hidden, block)))](
            values,
            weights if with_weights else values,
            own_values,
            own_weights if with_weights else own_values,
            slot,
            index,
            out,
            out_weights if with_weights else out,
            values.shape[0],
            hidden,
            ranks,
            experts_per_rank,
            values.stride(0),
            weights.stride(0) if with_weights else 0,
            own_values.stride(0),
            own_weights.stride(0) if with_weights else 0,
            WEIGHTS=with_weights,
            TOP_K=index.shape[1],
            K_PAD=power_of_2(index.shape[1]),
            BLOCK=block,
            num_warps=4,
        )
    return out, out_weights


def fill(
    rows: tuple[Tensor, Tensor, Tensor],
    first: int,
    count: int,
    source: Tensor,
    index: Tensor,
    weights: Tensor,
    num_experts: int,
) -> None:
    (tokens, hidden), top_k = source.shape, index.shape[1]
    values, row_weights, row_index = rows
    fill_rows[(count,)](
        source,
        index,
        weights,
        values,
        row_weights,
        row_index,
        tokens,
        first,
        hidden,
        num_experts,
        source.stride(0),
        values.stride(0),
        row_weights.stride(0),
        row_index.stride(0),
        TOP_K=top_k,
        K_PAD=power_of_2(top_k),
        BLOCK=min(power_of_2(hidden), _BLOCK),
        num_warps=4,
    )


def own_slots(index: Tensor, weights: Tensor, first: int, experts_per_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    (rows, top_k), per_block = index.shape, 128
    blocks = cdiv(rows, per_block)
    local_index = torch.empty(rows, top_k, dtype=torch.long, device=index.device)
    local_weights = weights.new_empty(rows, top_k)
    pairs = torch.empty(blocks, dtype=torch.int32, device=index.device)
    keep_own_slots[(blocks,)](
        index,
        weights,
        local_index,
        local_weights,
        pairs,
        rows,
        first,
        experts_per_rank,
        index.stride(0),
        weights.stride(0),
        TOP_K=top_k,
        K_PAD=power_of_2(top_k),
        ROWS=per_block,
        num_warps=4,
    )
    return local_index, local_weights, pairs


def sum_over_ranks(own: Tensor, others: Tensor, own_rank: int, total: Tensor) -> None:
    numel, block = own.numel(), 2048
    unit, ranks = 16 if numel % 16 == 0 else 1, others.shape[0] + 1
    grid = (cdiv(numel, block),)
    sum_parts[grid](own, others, total, numel // unit, own_rank, UNIT=unit, RANKS=ranks, BLOCK=block, num_warps=8)
