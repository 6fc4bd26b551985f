"""The maths: the GEMMs of the experts layer as Triton kernels, and what the layer computes.

Shape letters: T tokens, K top-k, H hidden, I intermediate, E experts, P (token, expert) pairs in use (P <=
T*K). A *slot* is one entry of `top_k_index[T, K]`, numbered t*K + k. A *row* is a slot's place once slots are
sorted by expert: rows `expert_offsets[e] .. expert_offsets[e+1]` belong to expert e. With s the routing
weight, the layer is

    forward     h = x[token] @ W1[e].T          saved for backward (or not): h, and nothing else of this size
                a = act(h)                      (gate, up = h.chunk(2); silu(gate) * up; or another of `glu`)
                y = a @ W2[e].T
                out[t] = sum_k s[t, k] * y[row(t, k)]

    backward    da = dout[token] @ W2[e]        never stored: consumed in this GEMM's epilogue, which
                ds = sum_i da * act(h)          reduces the gradient of the routing weight,
                dh = s * da * act'(h)           writes dh [P, 2I],
                sa = s * act(h)                 and writes sa [P, I]
                dW2[e] = dout[token].T @ sa     dW1[e] = dh.T @ x[token]
                dx[t] = sum_k (dh @ W1[e])[row(t, k)]

A low-rank change of a weight, W + outer.T @ inner with frozen W (LoRA), is never built: each GEMM that multiplies by W
begins its sum with (rows @ inner[e].T) @ outer[e], R columns more. low_rank.py makes these narrow rows [P, R]
and the gradients of inner and outer.

`x[token]` is gathered by the forward's own loads, or copied; the backward's rows are copied (gathered.py).
Every sum has one owner and a fixed order: no atomics, so two runs give the same bits. One tile belongs to one
expert; tiles are listed on the GPU (sort.list_tiles). Kernels that are launched carry `@cached_launch`; the
others are parts of them. Beside the GEMMs there are the sort (sort.py), the passes that move and add
(passes.py), and the gate in the epilogues (activation.py).

Operands named `*_src` are a TMA tensor descriptor where USE_TMA says so and a plain pointer elsewhere; one
source serves both. Row numbers are widened to 64 bits before they are multiplied by a stride: T*K*H passes
2^31 in real models.

The idea of gathering inside the GEMM is ScatterMoE's (Tan et al., arXiv 2403.08245); recomputing act(h) and
reducing ds in the epilogue of da, so that only h is saved, if anything, is SonicMoE's (Guo et al., arXiv
2512.14080). No code of theirs is used.
"""

import triton
import triton.language as tl

from .activation import activation, activation_backward, activation_backward_halves, glu, split_columns, split_pairs
from .cached_launch import cached_launch
from .tile_loads import (
    add_low_rank,
    load_gate_up,
    load_row_block,
    load_rows,
    load_weight,
    locate_tile,
    pair_columns,
    point_at_rows,
)


@cached_launch
@triton.jit(do_not_specialize=["h_rows"])
def up_projection(
    x_src,
    w_src,
    bias_ptr,
    low_rank_ptr,
    factor_ptr,
    h_ptr,
    a_ptr,
    place_ptr,
    tile_expert_ptr,
    tile_offset_ptr,
    expert_offset_ptr,
    hidden,
    intermediate,
    top_k,
    stride_xt,
    h_rows,
    GLU: tl.constexpr,
    STORES: tl.constexpr,
    LOADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """h[row] = x[token(row)] @ W1[e].T (+ bias[e], + the low-rank term), and a = act(h), gated: glu(gate, up). x is
    gathered by the loads.

    h is [h_rows, 2I] gated and [h_rows, I] if not, its columns in W1's own order, of the first rows where h_rows is
    less than P; a is [P, I]. Whichever is not asked for is neither computed nor touched. place: the rows' slots if
    LOADS.gather, else the experts' first padded tiles.
    """
    pid = tl.program_id(0)
    num_col_tiles = tl.cdiv(intermediate, TILE.block_n)
    expert = tl.load(tile_expert_ptr + pid // num_col_tiles)
    if expert < 0:
        return
    row0, row_end, col_tile = locate_tile(pid, expert, tile_offset_ptr, expert_offset_ptr, num_col_tiles, TILE)
    rows = row0 + tl.arange(0, TILE.block_p)
    in_expert = rows < row_end
    if LOADS.gather:
        # A row past the expert's end reads token 0: real memory, and masked at the store.
        token = tl.load(place_ptr + rows, mask=in_expert, other=0) // top_k
        x_row0 = row0
    else:
        # x was gathered before, with every expert's rows padded: the same rows lie elsewhere there
        token = rows
        x_row0 = tl.load(place_ptr + expert) * LOADS.pad + row0 - tl.load(expert_offset_ptr + expert)
    x_rows = point_at_rows(x_src, token, stride_xt, not LOADS.gather, TILE.block_k)
    col0 = col_tile * TILE.block_n

    BLOCK_P: tl.constexpr = TILE.block_p  # a shape needs constexprs of its own
    WIDTH: tl.constexpr = 2 * TILE.block_n if GLU.gated else TILE.block_n
    acc = tl.zeros((BLOCK_P, WIDTH), tl.float32)
    if LOADS.rank:
        first_col = col0 * 2 if GLU.gated and GLU.interleaved else col0
        wide = intermediate * (WIDTH // TILE.block_n)
        PAIRED: tl.constexpr = GLU.gated and not GLU.interleaved  # pyright: ignore
        acc = add_low_rank(
            acc, low_rank_ptr, factor_ptr, expert, row0, row_end, first_col, wide, PAIRED, LOADS, BLOCK_P, WIDTH
        )
    for k in range(0, hidden, TILE.block_k):
        x = load_rows(x_src, x_row0, x_rows, k, hidden, not LOADS.gather, LOADS.even, TILE.block_k)
        if GLU.gated and not GLU.interleaved:
            w = load_gate_up(
                w_src,
                expert,
                col0,
                k,
                intermediate,
                hidden,
                LOADS,
                TILE.block_n,
                TILE.block_k,
            )
        else:
            w = load_weight(
                w_src,
                expert,
                col0 * (WIDTH // TILE.block_n),
                k,
                intermediate * (WIDTH // TILE.block_n),
                hidden,
                LOADS,
                WIDTH,
                TILE.block_k,
            )
        acc = tl.dot(x, w, acc, input_precision=LOADS.precision)

    lane = tl.arange(0, TILE.block_p)[:, None]
    rows_left = row_end - row0
    cols = col0 + tl.arange(0, TILE.block_n)[None, :]
    mask = (lane < rows_left) & (cols < intermediate)
    h_left = tl.minimum(rows_left, h_rows - row0)
    # From the tile's first row on, offsets fit 32 bits.
    first = row0.to(tl.int64) * intermediate
    dtype = a_ptr.dtype.element_ty
    if LOADS.bias:
        col = pair_columns(col0, intermediate, WIDTH, TILE.block_n, GLU.interleaved)[None, :]
        bias = bias_ptr + expert.to(tl.int64) * (intermediate * (WIDTH // TILE.block_n)) + col
        acc += tl.load(bias, mask=col < intermediate * (WIDTH // TILE.block_n), other=0.0).to(tl.float32)
    if GLU.gated:
        if GLU.interleaved and STORES.h:
            col = 2 * col0 + tl.arange(0, WIDTH)[None, :]
            h_tile = h_ptr + 2 * first + (lane * (2 * intermediate) + col)
            tl.store(h_tile, acc.to(dtype), mask=(lane < h_left) & (col < 2 * intermediate))
        gate, up = split_pairs(acc, TILE.block_p, WIDTH, GLU.interleaved)
        if STORES.h and not GLU.interleaved:
            h_tile = h_ptr + 2 * first + (lane * (2 * intermediate) + cols)
            h_mask = (lane < h_left) & (cols < intermediate)
            tl.store(h_tile, gate.to(dtype), mask=h_mask)
            tl.store(h_tile + intermediate, up.to(dtype), mask=h_mask)
        activated, _, _ = glu(gate, up, GLU)
    else:
        if STORES.h:
            h_mask = (lane < h_left) & (cols < intermediate)
            tl.store(h_ptr + first + (lane * intermediate + cols), acc.to(dtype), mask=h_mask)
        activated, _ = activation(acc, GLU)
    if STORES.a:
        tl.store(a_ptr + first + (lane * intermediate + cols), activated.to(dtype), mask=mask)


@cached_launch
@triton.jit
def grouped_rows(
    a_src,
    w_src,
    bias_ptr,
    low_rank_ptr,
    factor_ptr,
    y_ptr,
    tile_expert_ptr,
    tile_offset_ptr,
    expert_offset_ptr,
    depth,
    width,
    LOADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """y[row] = a[row] @ weight[e] (+ bias[e], + the low-rank term), rows already grouped: the down-projection, and
    dh @ W1 of the backward.
    """
    pid = tl.program_id(0)
    num_col_tiles = tl.cdiv(width, TILE.block_n)
    expert = tl.load(tile_expert_ptr + pid // num_col_tiles)
    if expert < 0:
        return
    row0, row_end, col_tile = locate_tile(pid, expert, tile_offset_ptr, expert_offset_ptr, num_col_tiles, TILE)
    rows = row0 + tl.arange(0, TILE.block_p)
    # clamped, not masked: a row past the expert's end reads a valid one and is masked at the store
    a_rows = point_at_rows(a_src, tl.minimum(rows, row_end - 1), depth, LOADS.tma, TILE.block_k)
    col0 = col_tile * TILE.block_n

    BLOCK_P: tl.constexpr = TILE.block_p
    BLOCK_N: tl.constexpr = TILE.block_n
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if LOADS.rank:
        acc = add_low_rank(
            acc, low_rank_ptr, factor_ptr, expert, row0, row_end, col0, width, False, LOADS, BLOCK_P, BLOCK_N
        )
    for k in range(0, depth, TILE.block_k):
        a = load_rows(a_src, row0, a_rows, k, depth, LOADS.tma, LOADS.even, TILE.block_k)
        w = load_weight(
            w_src,
            expert,
            col0,
            k,
            width,
            depth,
            LOADS,
            TILE.block_n,
            TILE.block_k,
        )
        acc = tl.dot(a, w, acc, input_precision=LOADS.precision)

    lane = tl.arange(0, TILE.block_p)[:, None]
    cols = col0 + tl.arange(0, TILE.block_n)[None, :]
    mask = (lane < row_end - row0) & (cols < width)
    if LOADS.bias:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * width + cols, mask=cols < width, other=0.0)
        acc += bias.to(tl.float32)
    y_tile = y_ptr + row0.to(tl.int64) * width + (lane * width + cols)
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=mask)


@cached_launch
@triton.jit(do_not_specialize=["num_rows"])
def down_backward(
    dout_src,
    w_src,
    low_rank_ptr,
    factor_ptr,
    h_ptr,
    weight_ptr,
    dh_ptr,
    sa_ptr,
    ds_ptr,
    row_slot_ptr,
    pad_tile_ptr,
    tile_expert_ptr,
    tile_offset_ptr,
    expert_offset_ptr,
    num_rows,
    hidden,
    intermediate,
    GLU: tl.constexpr,
    LOADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """da = dout[token] @ W2[e], kept in registers, dout copied by rows (gathered.Padded); writes dh as h, sa [P, I] and
    ds partials [column tiles, P].
    """
    pid = tl.program_id(0)
    num_col_tiles = tl.cdiv(intermediate, TILE.block_n)
    expert = tl.load(tile_expert_ptr + pid // num_col_tiles)
    if expert < 0:
        return
    row0, row_end, col_tile = locate_tile(pid, expert, tile_offset_ptr, expert_offset_ptr, num_col_tiles, TILE)
    rows = row0 + tl.arange(0, TILE.block_p)
    in_expert = rows < row_end
    slot = tl.load(row_slot_ptr + rows, mask=in_expert, other=0)
    # dout was gathered with every expert's rows padded: the same rows lie elsewhere there
    pad0 = tl.load(pad_tile_ptr + expert) * LOADS.pad + row0 - tl.load(expert_offset_ptr + expert)
    d_row = pad0 + tl.minimum(tl.arange(0, TILE.block_p), row_end - 1 - row0)  # clamped: stay inside the buffer
    d_rows = point_at_rows(dout_src, d_row, hidden, LOADS.tma, TILE.block_k)
    col0 = col_tile * TILE.block_n

    BLOCK_P: tl.constexpr = TILE.block_p
    BLOCK_N: tl.constexpr = TILE.block_n
    da = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if LOADS.rank:
        da = add_low_rank(
            da, low_rank_ptr, factor_ptr, expert, row0, row_end, col0, intermediate, False, LOADS, BLOCK_P, BLOCK_N
        )
    for k in range(0, hidden, TILE.block_k):
        d = load_rows(dout_src, pad0, d_rows, k, hidden, LOADS.tma, LOADS.even, TILE.block_k)
        w = load_weight(
            w_src,
            expert,
            col0,
            k,
            intermediate,
            hidden,
            LOADS,
            TILE.block_n,
            TILE.block_k,
        )
        da = tl.dot(d, w, da, input_precision=LOADS.precision)

    scale = tl.load(weight_ptr + slot, mask=in_expert, other=0.0).to(tl.float32)
    first = row0.to(tl.int64) * intermediate
    h_first = 2 * first if GLU.gated else first
    h_tile, dh_tile, sa_tile = h_ptr + h_first, dh_ptr + h_first, sa_ptr + first
    rows_left = row_end - row0
    if TILE.chunks == 1:
        ds = activation_backward(
            da,
            scale,
            h_tile,
            dh_tile,
            sa_tile,
            rows_left,
            col0,
            intermediate,
            GLU,
            TILE.block_p,
            TILE.block_n,
        )
    elif TILE.chunks == 2:
        ds = activation_backward_halves(
            da,
            scale,
            h_tile,
            dh_tile,
            sa_tile,
            rows_left,
            col0,
            intermediate,
            GLU,
            TILE.block_p,
            TILE.block_n,
        )
    else:
        HALF: tl.constexpr = TILE.block_n // 2
        left, right = split_columns(da, TILE.block_p, TILE.block_n)
        ds = activation_backward_halves(
            left,
            scale,
            h_tile,
            dh_tile,
            sa_tile,
            rows_left,
            col0,
            intermediate,
            GLU,
            TILE.block_p,
            HALF,
        )
        ds += activation_backward_halves(
            right,
            scale,
            h_tile,
            dh_tile,
            sa_tile,
            rows_left,
            col0 + HALF,
            intermediate,
            GLU,
            TILE.block_p,
            HALF,
        )
    tl.store(ds_ptr + col_tile.to(tl.int64) * num_rows + rows, ds, mask=in_expert)


@cached_launch
@triton.jit
def weight_grad(
    left_src,
    right_src,
    dw_ptr,
    expert_offset_ptr,
    pad_tile_ptr,
    left_width,
    right_width,
    scale,
    group_m,
    LEFT_PADDED: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PAD: tl.constexpr,
):
    """dw[e] = scale * left[rows of e].T @ right[rows of e], [left_width, right_width]; zeros for an idle expert.

    One operand is padded (gathered.Padded; the left one if LEFT_PADDED), the other is not. PAD is a multiple
    of BLOCK_P.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(left_width, BLOCK_M)
    tiles_n = tl.cdiv(right_width, BLOCK_N)
    expert = pid // (tiles_m * tiles_n)
    local = pid % (tiles_m * tiles_n)
    group = local // (group_m * tiles_n)
    group_rows = tl.minimum(tiles_m - group * group_m, group_m)
    local -= group * group_m * tiles_n
    m0 = (group * group_m + local % group_rows) * BLOCK_M
    n0 = (local // group_rows) * BLOCK_N
    start = tl.load(expert_offset_ptr + expert)
    end = tl.load(expert_offset_ptr + expert + 1)
    padding = tl.load(pad_tile_ptr + expert) * PAD - start  # from a row to the same row in the padded operand
    if LEFT_PADDED:
        left_shift, right_shift = padding, 0
    else:
        left_shift, right_shift = 0, padding

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(start, end, BLOCK_P):
        left = load_row_block(
            left_src, row + left_shift, end, m0, left_width, LEFT_PADDED, USE_TMA, EVEN, BLOCK_P, BLOCK_M
        )
        right = load_row_block(
            right_src, row + right_shift, end, n0, right_width, not LEFT_PADDED, USE_TMA, EVEN, BLOCK_P, BLOCK_N
        )
        acc = tl.dot(left.T, right, acc, input_precision=PRECISION)

    lane = tl.arange(0, BLOCK_M)[:, None]
    cols = n0 + tl.arange(0, BLOCK_N)[None, :]
    mask = (m0 + lane < left_width) & (cols < right_width)
    dw = dw_ptr + (expert.to(tl.int64) * left_width + m0) * right_width + (lane * right_width + cols)
    tl.store(dw, (acc * scale).to(dw_ptr.dtype.element_ty), mask=mask)
