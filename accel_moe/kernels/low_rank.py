"""Low-rank changes of frozen weights (LoRA), without the change of a matrix and without its gradient.

A change is outer[e].T @ inner[e], inner [E, R, in] and outer [E, R, out]. The GEMMs add its product as a term of their
sum (launch.Term). Here are the passes around them, each bound by memory: `narrow_rows` makes [P, R] from rows, and
`factor_grad` sums a factor's gradient over the rows of each expert.

For a projection y = x @ (W + change).T of rows x, with p = scale * x @ inner.T and u = scale * dy @ outer.T:

    y = x @ W.T + p @ outer             d outer = p.T @ dy
    dx = dy @ W + u @ inner             d inner = u.T @ x

LoRA is Hu et al.'s (arXiv 2106.09685). Letters and terms are gemm.py's.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import cdiv, power_of_2
from .cached_launch import cached_launch
from .gathered import INTERPRETED, PAD, TileLists
from .launch import Term, precision
from .routing import Routing


@cached_launch
@triton.jit
def narrow_rows(
    src,
    factor_ptr,
    out_ptr,
    row_slot_ptr,
    tile_expert_ptr,
    tile_offset_ptr,
    expert_offset_ptr,
    depth,
    stride,
    top_k,
    scale,
    GATHER: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[row] = scale * src[row, or token(row) if GATHER] @ factor[e].T, [P, RANK]."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    row0 = tl.load(expert_offset_ptr + expert) + (tile - tl.load(tile_offset_ptr + expert)) * BLOCK_P
    lane = tl.arange(0, BLOCK_P)
    inside = row0 + lane < tl.load(expert_offset_ptr + expert + 1)
    source = row0 + lane
    if GATHER:
        source = tl.load(row_slot_ptr + source, mask=inside, other=0) // top_k
    column = tl.arange(0, BLOCK_K)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = src + source.to(tl.int64)[:, None] * stride + column[None, :]
    factor = factor_ptr + expert.to(tl.int64) * (RANK * depth) + (rank[None, :] * depth + column[:, None])
    acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for k in range(0, depth, BLOCK_K):
        left = tl.load(rows + k, mask=inside[:, None] & (k + column < depth)[None, :], other=0.0)
        right = tl.load(factor + k, mask=(k + column < depth)[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    out = out_ptr + row0.to(tl.int64) * RANK + (lane[:, None] * RANK + rank[None, :])
    tl.store(out, (acc * scale).to(out_ptr.dtype.element_ty), mask=inside[:, None])


@cached_launch
@triton.jit
def factor_grad(
    narrow_ptr,
    wide_ptr,
    out_ptr,
    weight_ptr,
    row_slot_ptr,
    expert_offset_ptr,
    width,
    stride,
    top_k,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[e] = narrow[rows of e].T @ wide[rows of e, or their tokens if GATHER], [RANK, width]. WEIGHTED: each row
    counts times its routing weight. Zeros for an idle expert.
    """
    tiles = tl.cdiv(width, BLOCK_N)
    expert = tl.program_id(0) // tiles
    column = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    end = tl.load(expert_offset_ptr + expert + 1)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for first in range(tl.load(expert_offset_ptr + expert), end, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)
        inside = row < end
        left = tl.load(narrow_ptr + row.to(tl.int64)[:, None] * RANK + rank[None, :], mask=inside[:, None], other=0.0)
        source = row
        if GATHER or WEIGHTED:
            slot = tl.load(row_slot_ptr + row, mask=inside, other=0)
        if WEIGHTED:
            weight = tl.load(weight_ptr + slot, mask=inside, other=0.0).to(tl.float32)
            left = (left.to(tl.float32) * weight[:, None]).to(narrow_ptr.dtype.element_ty)
        if GATHER:
            source = slot // top_k
        mask = inside[:, None] & (column < width)[None, :]
        right = tl.load(wide_ptr + source.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
        acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
    out = out_ptr + expert.to(tl.int64) * (RANK * width) + (rank[:, None] * width + column[None, :])
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(column < width)[None, :])


class Change(NamedTuple):
    """A change of one weight in an op: scale * outer[e].T @ inner[e]."""

    inner: Tensor  # [E, R, in]
    outer: Tensor  # [E, R, out]
    scale: float

    @classmethod
    def of(cls, inner: Tensor | None, outer: Tensor | None, scale: float) -> "Change | None":
        return None if inner is None or outer is None else cls(inner.contiguous(), outer.contiguous(), scale)

    def down(self, src: Tensor, routing: Routing, tiles: TileLists, gather: bool = False) -> Term:
        """src [P, in], or [T, in] if gather -> the term of src @ change.T."""
        return Term(_narrow(src, self.inner, self.scale, routing, tiles, gather), self.outer)

    def up(self, src: Tensor, routing: Routing, tiles: TileLists, gather: bool = False) -> Term:
        """src [P, out], or [T, out] if gather -> the term of src @ change: the way back."""
        return Term(_narrow(src, self.outer, self.scale, routing, tiles, gather), self.inner)


def _block_r(rank: int) -> int:
    return min(rank, 64)


def _narrow(src: Tensor, factor: Tensor, scale: float, routing: Routing, tiles: TileLists, gather: bool) -> Tensor:
    rank, depth = factor.shape[1:]
    out = src.new_empty(routing.num_rows, rank)
    rows = tiles[PAD]
    if rows.max_tiles:
        narrow_rows[(rows.max_tiles, rank // _block_r(rank))](
            src,
            factor,
            out,
            routing.row_slot,
            rows.tile_expert,
            rows.tile_offsets,
            routing.expert_offsets,
            depth,
            src.stride(0),
            routing.top_k,
            float(scale),
            GATHER=gather,
            RANK=rank,
            PRECISION=precision(src),
            BLOCK_P=PAD,
            BLOCK_K=16 if INTERPRETED else 128 // src.element_size(),
            BLOCK_R=_block_r(rank),
            num_warps=4,
            num_stages=3,
        )
    return out


def grad(
    narrow: Tensor,
    wide: Tensor,
    routing: Routing,
    gather: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """narrow [P, R], wide [P, width], or [T, width] if gather -> the gradient of a factor, [E, R, width]. weights
    [T, K]: each row counts with its routing weight."""
    rank, width = narrow.shape[1], wide.shape[1]
    out = wide.new_empty(routing.num_experts, rank, width)
    block = 16 if INTERPRETED else 128
    grid = (routing.num_experts * cdiv(width, block), rank // _block_r(rank))
    if grid[0]:
        factor_grad[grid](
            narrow,
            wide,
            out,
            narrow if weights is None else weights,
            routing.row_slot,
            routing.expert_offsets,
            width,
            wide.stride(0),
            routing.top_k,
            GATHER=gather,
            WEIGHTED=weights is not None,
            RANK=rank,
            PRECISION=precision(wide),
            BLOCK_P=16 if INTERPRETED else 256 // wide.element_size(),
            BLOCK_N=block,
            BLOCK_R=_block_r(rank),
            num_warps=4,
            num_stages=3,
        )
    return out


def padded(factor: Tensor) -> Tensor:
    """[E, r, width] -> [E, R, width] with zeros, R the next of 16, 32, 64, 128, 192, ...: tl.dot's. Differentiable."""
    rank = factor.shape[1]
    to = max(16, power_of_2(rank)) if rank <= 64 else cdiv(rank, 64) * 64
    return factor if to == rank else torch.nn.functional.pad(factor, (0, 0, 0, to - rank))
