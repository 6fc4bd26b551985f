"""Triton kernels that only move and add: rows into order, slots into sums, and what the biases need.

Each is bound by memory. Letters and terms are gemm.py's; every sum has one owner and a fixed order here, too.
"""

import triton
import triton.language as tl

from .cached_launch import cached_launch


@cached_launch
@triton.jit
def place_rows(
    out_ptr,
    slot_place_ptr,
    row_slot_ptr,
    tile_expert_ptr,
    tile_offset_ptr,
    expert_offset_ptr,
    width,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """slot_place[slot] = the slot's row in out [max_tiles * PAD, width], where each expert's rows are padded to a
    multiple of PAD: row tile i of height PAD becomes rows i * PAD .. (i + 1) * PAD. Writes the padding: zeros, which
    let weight_grad sum whole blocks with no mask.
    """
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    first = tl.load(expert_offset_ptr + expert) + (tile - tl.load(tile_offset_ptr + expert)) * PAD
    used = tl.minimum(tl.load(expert_offset_ptr + expert + 1) - first, PAD)
    lane = tl.arange(0, PAD)
    slot = tl.load(row_slot_ptr + first + lane, mask=lane < used, other=0)
    tl.store(slot_place_ptr + slot, tile * PAD + lane, mask=lane < used)
    zero = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
    for row in range(tile * PAD + used, (tile + 1) * PAD):
        for col in range(0, width, BLOCK):
            cols = col + tl.arange(0, BLOCK)
            tl.store(out_ptr + tl.cast(row, tl.int64) * width + cols, zero, mask=cols < width)


@cached_launch
@triton.jit
def spread_rows(
    x_ptr, out_ptr, slot_row_ptr, slot_place_ptr, width, stride_xt, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """out[slot_place[t, k]] = x[t] for each slot that has a row. Each token is read once and written K times: reading
    it once per row took half as long again.
    """
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + t * stride_xt + cols, mask=cols < width, other=0.0)
    for k in tl.static_range(TOP_K):  # pyright: ignore
        if tl.load(slot_row_ptr + t * TOP_K + k) >= 0:
            place = tl.load(slot_place_ptr + t * TOP_K + k).to(tl.int64)
            tl.store(out_ptr + place * width + cols, value, mask=cols < width)


@cached_launch
@triton.jit
def sum_slots(
    y_ptr,
    slot_row_ptr,
    weight_ptr,
    out_ptr,
    hidden,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[t] = sum_k weight[t, k] * y[slot_row[t, k]], k ascending, in fp32; a sentinel (row -1) adds
    nothing.

    Without WEIGHTED it is the plain sum that turns the gradient of x[token] into the gradient of x.
    """
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOP_K):  # pyright: ignore
        row = tl.load(slot_row_ptr + t * TOP_K + k)
        width = tl.where(row >= 0, hidden, 0)
        value = tl.load(y_ptr + row.to(tl.int64) * hidden + cols, mask=cols < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            # where, not a product alone: a sentinel's weight may be anything, NaN included
            value *= tl.where(row >= 0, tl.load(weight_ptr + t * TOP_K + k).to(tl.float32), 0.0)
        acc += value
    tl.store(out_ptr + t * hidden + cols, acc.to(out_ptr.dtype.element_ty), mask=cols < hidden)


@cached_launch
@triton.jit(do_not_specialize=["num_slots", "num_rows", "slot_blocks"])
def sum_routing_grad(
    ds_ptr,
    slot_row_ptr,
    out_ptr,
    first_ptr,
    second_ptr,
    expert_offset_ptr,
    num_slots,
    num_rows,
    slot_blocks,
    num_parts,
    num_experts,
    first_width,
    second_width,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Two small things after `down_backward`, in one launch; either may have no programs.

    Of the first slot_blocks programs, d top_k_weights[slot] = sum of the slot's ds partials, in order; exactly 0 for a
    sentinel.

    Each program after these zeroes one row of two [num_rows, width] buffers, from the last used one on; first is the
    wider. weight_grad reads whole blocks of rows and masks one operand to zero; the other must then be finite, for 0 *
    NaN is NaN.
    """
    block = tl.program_id(0)
    if block < slot_blocks:
        slot = block * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(slot_row_ptr + slot, mask=slot < num_slots, other=-1)
        acc = tl.zeros((BLOCK,), tl.float32)
        for part in range(0, num_parts):
            acc += tl.load(ds_ptr + tl.cast(part, tl.int64) * num_rows + row, mask=row >= 0, other=0.0)
        tl.store(out_ptr + slot, acc.to(out_ptr.dtype.element_ty), mask=slot < num_slots)
    else:
        unused = (tl.load(expert_offset_ptr + num_experts) + block - slot_blocks).to(tl.int64)
        if unused < num_rows:
            for col in range(0, first_width, BLOCK_W):
                cols = col + tl.arange(0, BLOCK_W)
                zero = tl.zeros((BLOCK_W,), first_ptr.dtype.element_ty)
                tl.store(first_ptr + unused * first_width + cols, zero, mask=cols < first_width)
                tl.store(second_ptr + unused * second_width + cols, zero, mask=cols < second_width)


@cached_launch
@triton.jit
def sum_expert_rows(
    src_ptr,
    weight_ptr,
    out_ptr,
    row_slot_ptr,
    expert_offset_ptr,
    width,
    stride,
    top_k,
    scale,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A bias gradient: out[e] = scale * sum of src over e's rows, top to bottom.

    WEIGHTED: src is [T, width], read at each row's token and multiplied by its routing weight; else src is [P,
    width].
    """
    expert = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(expert_offset_ptr + expert + 1)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.load(expert_offset_ptr + expert), end, ROWS):
        rows = start + tl.arange(0, ROWS)
        used = rows < end
        if WEIGHTED:
            slot = tl.load(row_slot_ptr + rows, mask=used, other=0)
            rows = slot // top_k
        mask = used[:, None] & (cols < width)[None, :]
        value = tl.load(src_ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight_ptr + slot, mask=used, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(value, axis=0)
    out = out_ptr + expert.to(tl.int64) * width + cols
    tl.store(out, (acc * scale).to(out_ptr.dtype.element_ty), mask=cols < width)


@cached_launch
@triton.jit
def dot_bias(
    dout_ptr,
    bias_ptr,
    ds_ptr,
    row_slot_ptr,
    tile_expert_ptr,
    tile_offset_ptr,
    expert_offset_ptr,
    width,
    stride,
    top_k,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ds[row] = dout[token] . bias[e]: what the down-projection's bias adds to the gradient of the routing weight."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    start = tl.load(expert_offset_ptr + expert) + (tile - tl.load(tile_offset_ptr + expert)) * BLOCK_P
    rows = start + tl.arange(0, BLOCK_P)
    used = rows < tl.load(expert_offset_ptr + expert + 1)
    token = tl.load(row_slot_ptr + rows, mask=used, other=0) // top_k
    acc = tl.zeros((BLOCK_P,), tl.float32)
    for col in range(0, width, BLOCK):
        cols = col + tl.arange(0, BLOCK)
        bias = tl.load(bias_ptr + expert.to(tl.int64) * width + cols, mask=cols < width, other=0.0).to(tl.float32)
        source = dout_ptr + token.to(tl.int64)[:, None] * stride + cols[None, :]
        value = tl.load(source, mask=used[:, None] & (cols < width)[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(value * bias[None, :], axis=1)
    tl.store(ds_ptr + rows, acc, mask=used)
