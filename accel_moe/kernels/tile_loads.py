"""Parts that the GEMMs share: which tile a program has, and how the tiles of its operands are loaded.

Letters, slots and rows are gemm.py's. An operand named `src` is a TMA tensor descriptor if LOADS.tma, else a pointer.
"""

import triton
import triton.language as tl


@triton.jit
def locate_tile(
    pid,
    expert,
    tile_offset_ptr,
    expert_offset_ptr,
    num_col_tiles,
    TILE: tl.constexpr,
):
    """-> first row, end of the expert's rows, column tile.

    An expert's tiles are walked TILE.group row tiles at a time, all of those before the next column tile, so
    that the weight columns and the rows that programs in flight need stay in L2.
    """
    first_tile = tl.load(tile_offset_ptr + expert)
    num_row_tiles = tl.load(tile_offset_ptr + expert + 1) - first_tile
    local = pid - first_tile * num_col_tiles
    group = local // (TILE.group * num_col_tiles)
    group_rows = tl.minimum(num_row_tiles - group * TILE.group, TILE.group)
    local -= group * TILE.group * num_col_tiles
    row_tile = group * TILE.group + local % group_rows
    start = tl.load(expert_offset_ptr + expert)
    return start + row_tile * TILE.block_p, tl.load(expert_offset_ptr + expert + 1), local // group_rows


@triton.jit
def point_at_rows(src, row, stride, USE_TMA: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_P, BLOCK_K] pointers to the first columns of these rows; a descriptor needs none."""
    if USE_TMA:
        pointers = row
    else:
        pointers = src + row.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]
    return pointers


@triton.jit
def load_rows(src, row, pointers, k, depth, USE_TMA: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_P, BLOCK_K] of a row-major operand: by descriptor from `row`, or through gathered row
    `pointers`.
    """
    if USE_TMA:
        tile = src.load([row, k])
    elif EVEN:
        tile = tl.load(pointers + k)
    else:
        tile = tl.load(pointers + k, mask=(k + tl.arange(0, BLOCK_K))[None, :] < depth, other=0.0)
    return tile


@triton.jit
def point_at_weight(src, expert, n, k, width, depth, LOADS: tl.constexpr):
    """[k, n] pointers into weight[expert], stored as [width, depth], or as [depth, width] if not k_contiguous."""
    first = src + expert.to(tl.int64) * (width * depth)
    if LOADS.k_contiguous:
        pointers = first + n[None, :] * depth + k[:, None]
    else:
        pointers = first + n[None, :] + k[:, None] * width
    return pointers


@triton.jit
def load_weight(
    src,
    expert,
    n,
    k,
    width,
    depth,
    LOADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_K, BLOCK_N] of weight[expert] read as [depth, width], whichever of the two is contiguous in
    memory.
    """
    if LOADS.tma and LOADS.k_contiguous:
        tile = src.load([expert, n, k]).reshape(BLOCK_N, BLOCK_K).T
    elif LOADS.tma:
        tile = src.load([expert, k, n]).reshape(BLOCK_K, BLOCK_N)
    else:
        offs_n = n + tl.arange(0, BLOCK_N)
        offs_k = k + tl.arange(0, BLOCK_K)
        pointers = point_at_weight(src, expert, offs_n, offs_k, width, depth, LOADS)
        if LOADS.even:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(offs_k < depth)[:, None] & (offs_n < width)[None, :], other=0.0)
    return tile


@triton.jit
def load_gate_up(
    src,
    expert,
    i,
    k,
    intermediate,
    depth,
    LOADS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_K, 2 * BLOCK_I]: the gate columns i.. and the up columns intermediate + i.. side by side, for
    one dot.

    The descriptor sees the weight as [E, 2, I, H] (or [E, H, 2, I]), so both come in one copy.
    """
    if LOADS.tma and LOADS.k_contiguous:
        tile = src.load([expert, 0, i, k]).reshape(2 * BLOCK_I, BLOCK_K).T
    elif LOADS.tma:
        tile = src.load([expert, k, 0, i]).reshape(BLOCK_K, 2 * BLOCK_I)
    else:
        lane = tl.arange(0, 2 * BLOCK_I)
        offs_i = i + lane % BLOCK_I
        offs_n = offs_i + (lane // BLOCK_I) * intermediate
        offs_k = k + tl.arange(0, BLOCK_K)
        pointers = point_at_weight(src, expert, offs_n, offs_k, 2 * intermediate, depth, LOADS)
        if LOADS.even:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(offs_k < depth)[:, None] & (offs_i < intermediate)[None, :], other=0.0)
    return tile


@triton.jit
def pair_columns(i, intermediate, WIDTH: tl.constexpr, BLOCK_I: tl.constexpr, INTERLEAVED: tl.constexpr):
    """[WIDTH]: the columns of W1 that a tile from i on has: gate i.. and up i.. side by side, or by turns; or i.. if
    WIDTH is BLOCK_I. Past the last i, a column past all of W1's.
    """
    lane = tl.arange(0, WIDTH)
    if WIDTH == BLOCK_I:
        columns = i + lane
    elif INTERLEAVED:
        columns = 2 * i + lane
    else:
        offs_i = i + lane % BLOCK_I
        columns = tl.where(offs_i < intermediate, offs_i + (lane // BLOCK_I) * intermediate, 2 * intermediate)
    return columns


@triton.jit
def add_low_rank(
    acc,
    rows_ptr,
    factor_ptr,
    expert,
    row0,
    row_end,
    col0,
    width,
    PAIRED: tl.constexpr,
    LOADS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """acc + rows[row0 ..] @ factor[expert][:, col0 ..], of rows [P, LOADS.rank] and factor [E, LOADS.rank, width].

    PAIRED: the columns col0 .. and width / 2 + col0 .. side by side, half of BLOCK_N each. A column past the last adds
    nothing.
    """
    RANK: tl.constexpr = LOADS.rank
    # 16: each block's operands take shared memory beside those of the sum
    BLOCK: tl.constexpr = 16  # pyright: ignore
    HALF: tl.constexpr = BLOCK_N // 2
    lane = tl.arange(0, BLOCK_P)[:, None]
    inside = lane < row_end - row0
    rank = tl.arange(0, BLOCK)
    rows = rows_ptr + row0.to(tl.int64) * RANK + (lane * RANK + rank[None, :])
    factor = factor_ptr + expert.to(tl.int64) * (RANK * width)
    for first in tl.static_range(0, RANK, BLOCK):  # pyright: ignore
        left = tl.load(rows + first, mask=inside, other=0.0)
        if PAIRED:  # three dimensions, so that neighbours are seen to be neighbours
            columns = (col0 + tl.arange(0, HALF))[None, None, :]
            places = (first + rank)[:, None, None] * width + tl.arange(0, 2)[None, :, None] * (width // 2) + columns
            right = tl.load(factor + places, mask=columns < width // 2, other=0.0).reshape(BLOCK, BLOCK_N)
        else:
            columns = (col0 + tl.arange(0, BLOCK_N))[None, :]
            right = tl.load(factor + (first + rank)[:, None] * width + columns, mask=columns < width, other=0.0)
        acc = tl.dot(left, right, acc, input_precision=LOADS.precision)
    return acc


@triton.jit
def load_row_block(
    src,
    row,
    row_end,
    col,
    width,
    PADDED: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[BLOCK_P, BLOCK_N] of consecutive rows. By descriptor, a block of an operand that is not PADDED runs on into
    the next expert's rows: finite numbers, which the padded operand's zeros cancel.
    """
    if USE_TMA:
        tile = src.load([row, col])
    else:
        rows = row + tl.arange(0, BLOCK_P)
        cols = col + tl.arange(0, BLOCK_N)
        pointers = src + rows.to(tl.int64)[:, None] * width + cols[None, :]
        if PADDED and EVEN:
            tile = tl.load(pointers)
        elif PADDED:
            tile = tl.load(pointers, mask=(cols < width)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(rows < row_end)[:, None] & (cols < width)[None, :], other=0.0)
    return tile
