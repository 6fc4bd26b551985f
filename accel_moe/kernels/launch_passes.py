"""Launches of the passes that add (passes.py). One function per kernel, as in launch.py; no host sync."""

import torch
from torch import Tensor

from . import passes, sort
from .arithmetic import cdiv, power_of_2
from .gathered import INTERPRETED, PAD, TileLists
from .launch import on_device
from .routing import Routing


def sum_slots(y: Tensor, routing: Routing, weights: Tensor | None, num_tokens: int) -> Tensor:
    """y [P, H] -> [T, H]: each token's rows, weighted or plain, k ascending."""
    hidden = y.shape[1]
    out = y.new_empty(num_tokens, hidden)
    block = min(power_of_2(hidden), 64 if INTERPRETED else 2048)
    if out.numel():
        passes.sum_slots[(num_tokens, cdiv(hidden, block))](
            y,
            routing.slot_row,
            y if weights is None else weights,
            out,
            hidden,
            TOP_K=routing.top_k,
            WEIGHTED=weights is not None,
            BLOCK_H=block,
            num_warps=4,
        )
    return out


def routing_grad(ds: Tensor, dh: Tensor, sa: Tensor, routing: Routing, like: Tensor, needed: bool, tail: int) -> Tensor:
    """ds partials [parts, P] -> the gradient of top_k_weights [T, K], as `like`; no elements if it is not needed.
    `tail` rows of dh and sa after the last used one become zeros."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format) if needed else like.new_empty(0)
    slots, block = out.numel(), 256
    slot_blocks = cdiv(slots, block)
    if slot_blocks + tail:
        passes.sum_routing_grad[(slot_blocks + tail,)](
            ds,
            routing.slot_row,
            out,
            dh,
            sa,
            routing.expert_offsets,
            slots,
            routing.num_rows,
            slot_blocks,
            ds.shape[0],
            routing.num_experts,
            dh.shape[1],
            sa.shape[1],
            BLOCK=block,
            BLOCK_W=1024,
        )
    return out


def bias_grad(
    src: Tensor, weights: Tensor | None, routing: Routing, like: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """The gradient of a bias [E, width], in dtype: src [P, width] summed per expert, or src [T, width] at each row's
    token times its routing weight.
    """
    out = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    width, block = like.shape[1], 128
    passes.sum_expert_rows[(routing.num_experts, cdiv(width, block))](
        src,
        src if weights is None else weights,
        out,
        routing.row_slot,
        routing.expert_offsets,
        width,
        src.stride(0),
        routing.top_k,
        scale,
        WEIGHTED=weights is not None,
        ROWS=16,
        BLOCK=block,
    )
    return out


def dot_bias(dout: Tensor, bias: Tensor, ds: Tensor, routing: Routing, tiles: TileLists) -> None:
    """ds [P] = each row's dout[token] . bias[expert]."""
    rows = tiles[PAD]
    if rows.max_tiles:
        passes.dot_bias[(rows.max_tiles,)](
            dout,
            bias,
            ds,
            routing.row_slot,
            rows.tile_expert,
            rows.tile_offsets,
            routing.expert_offsets,
            dout.shape[1],
            dout.stride(0),
            routing.top_k,
            BLOCK_P=PAD,
            BLOCK=64,
        )


def add_counts(top_k_index: Tensor, total: Tensor) -> None:
    """total [E] int64 grows by each expert's slots in top_k_index[T, K]."""
    num_slots, num_experts, slots = top_k_index.numel(), total.numel(), 1024
    if num_slots:
        index, bins = top_k_index.contiguous(), power_of_2(num_experts + 1)
        with on_device(index):
            sort.add_counts[(cdiv(num_slots, slots),)](index, total, num_slots, num_experts, BINS=bins, SLOTS=slots)
