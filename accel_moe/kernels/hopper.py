"""gemm.py's up_projection and grouped_rows for Hopper, in Gluon: rows times weights.

hopper_backward.py has down_backward, hopper_gradients.py weight_grad, and hopper_parts.py their common parts.

They compute what their namesakes in gemm.py compute. What differs is who does it, and when:

    grid        one program a multiprocessor, which walks many tiles
    loader      one warp (four where it gathers rows) copies the operands' tiles into a ring of TILE.num_stages buffers,
                by the copy engine (TMA). It runs ahead: the next tile's operands come while this one's result is stored
    finisher    eight warps, two warpgroups: multiply what is in the ring (wgmma), and pass the result through a staging
                buffer to the copy engine, which writes it while the next tile is summed

Two barriers go with each buffer of the ring: `ready`, its bytes have come, and `free`, they have been used.

The copy engine clips what it writes at a tensor's edges, and an expert's last row is no edge. launch_hopper._clipped
makes it one: two strides cancel each other modulo 2**64, so that any row can be the last. The trick is that of
triton.tools.ragged_tma.

launch_hopper.py launches these kernels. Letters, terms and the order of every sum are gemm.py's; LOADS is launch.Loads.
`walk` is a kernel's tiles: tile_expert, tile_offsets, expert_offsets, the number of column tiles, and of all tiles.
"""

# pyright: reportAssignmentType=false
# In a kernel, `gl.constexpr` after a name says that it is a constant, not which type it has.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from .activation import activation, glu
from .cached_launch import cached_launch
from .hopper_parts import (
    GATHERING_THREADS,
    clipped_rows,
    copy_in,
    copy_weight,
    find_tile,
    gather_in,
    halves,
    make_barriers,
    make_ring,
    next_step,
    store_tile,
    sum_tile,
)

# ---- Rows times weights


# fmt: off
@gluon.jit
def _load_rows(
    x_desc, w_desc, ring, walk, place_ptr, depth, stride_x, top_k,
    PAIRED: gl.constexpr, STEP: gl.constexpr, LOADS: gl.constexpr, TILE: gl.constexpr,
):
    # fmt: on
    """The loader, rows by TMA. With LOADS.pad they lie where each expert's rows are padded to a multiple of it. STEP:
    the weight's columns from one column tile to the next."""
    x_ring, w_ring, ready, free = ring
    BYTES: gl.constexpr = x_desc.block_type.nbytes + w_desc.block_type.nbytes
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), walk[4], gl.num_programs(0)):
        expert, row0, _, col_tile = find_tile(tile, walk, TILE)
        if LOADS.pad:
            row0 += gl.load(place_ptr + expert) * LOADS.pad - gl.load(walk[2] + expert)
        for k in range(0, depth, TILE.block_k):
            mbarrier.wait(free.index(stage), phase)
            bar = ready.index(stage)
            mbarrier.expect(bar, BYTES)
            copy_in(x_desc, [row0, k], bar, x_ring.index(stage))
            copy_weight(w_desc, bar, w_ring.index(stage), expert, col_tile * STEP, k, PAIRED, LOADS)
            stage, phase = next_step(stage, phase, TILE.num_stages)


# fmt: off
@gluon.jit
def _gather_rows(
    x_ptr, w_desc, ring, walk, row_slot_ptr, depth, stride_x, top_k,
    PAIRED: gl.constexpr, STEP: gl.constexpr, LOADS: gl.constexpr, TILE: gl.constexpr,
):
    # fmt: on
    """The loader, rows x[token] by asynchronous copies of 16 bytes. depth is a multiple of TILE.block_k."""
    x_ring, w_ring, ready, free = ring
    K: gl.constexpr = TILE.block_k
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    lane = gl.arange(0, TILE.block_p, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, K, gl.SliceLayout(0, LAYOUT))
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), walk[4], gl.num_programs(0)):
        expert, row0, row_end, col_tile = find_tile(tile, walk, TILE)
        # A row past the expert's end reads token 0: real memory, and clipped at the store.
        slot = gl.load(row_slot_ptr + row0 + lane, mask=row0 + lane < row_end, other=0)
        rows = x_ptr + (slot // top_k).to(gl.int64)[:, None] * stride_x + column[None, :]
        for k in range(0, depth, K):
            mbarrier.wait(free.index(stage), phase)
            bar = ready.index(stage)
            mbarrier.expect(bar, w_desc.block_type.nbytes)
            copy_weight(w_desc, bar, w_ring.index(stage), expert, col_tile * STEP, k, PAIRED, LOADS)
            gather_in(x_ring.index(stage), rows + k)
            async_copy.mbarrier_arrive(bar, increment_count=False)  # of each thread, once its copies are done
            stage, phase = next_step(stage, phase, TILE.num_stages)


@gluon.jit
def _finish_rows(
    y_desc,
    bias_ptr,
    staging,
    ring,
    walk,
    depth,
    width,
    LOADS: gl.constexpr,
    TILE: gl.constexpr,
):
    M: gl.constexpr = TILE.block_p
    N: gl.constexpr = TILE.block_n
    steps = gl.cdiv(depth, TILE.block_k)
    position = 0
    for tile in range(gl.program_id(0), walk[4], gl.num_programs(0)):
        expert, row0, row_end, col_tile = find_tile(tile, walk, TILE)
        acc = sum_tile(ring, position, steps, False, LOADS.k_contiguous, False, M, N, TILE.block_k)
        position += steps
        if LOADS.bias:
            cols = col_tile * N + gl.arange(0, N, gl.SliceLayout(0, acc.type.layout))
            bias = gl.load(bias_ptr + expert.to(gl.int64) * width + cols, mask=cols < width, other=0.0)
            acc += bias.to(gl.float32)[None, :]
        store_tile(y_desc, staging, acc, clipped_rows(row0, row_end), (), col_tile * N, 0)
    tma.store_wait(0)


@cached_launch
@gluon.jit
def grouped_rows(
    a_desc,
    w_desc,
    y_desc,
    bias_ptr,
    tile_expert_ptr,
    tile_offset_ptr,
    expert_offset_ptr,
    num_experts,
    depth,
    width,
    LOADS: gl.constexpr,
    TILE: gl.constexpr,
):
    """y[row] = a[row] @ weight[e] (+ bias[e]), rows already grouped."""
    ready, free = make_barriers(TILE.num_stages, 1)
    ring = make_ring(a_desc, TILE.num_stages), make_ring(w_desc, TILE.num_stages), ready, free
    staging = make_ring(y_desc, 256 // TILE.block_p)
    cols = gl.cdiv(width, TILE.block_n)
    walk = tile_expert_ptr, tile_offset_ptr, expert_offset_ptr, cols, gl.load(tile_offset_ptr + num_experts) * cols
    BLOCK_N: gl.constexpr = TILE.block_n
    # fmt: off
    gl.warp_specialize([
        (_finish_rows, (y_desc, bias_ptr, staging, ring, walk, depth, width, LOADS, TILE)),
        (_load_rows, (a_desc, w_desc, ring, walk, tile_offset_ptr, depth, 0, 1, False, BLOCK_N, LOADS, TILE)),
    ], [1], [24])
    # fmt: on


@gluon.jit
def _finish_up(
    h_desc,
    a_desc,
    bias_ptr,
    staging,
    ring,
    walk,
    depth,
    intermediate,
    h_rows,
    LOADS: gl.constexpr,
    GLU: gl.constexpr,
    STORES: gl.constexpr,
    TILE: gl.constexpr,
):
    M: gl.constexpr = TILE.block_p
    I: gl.constexpr = TILE.block_n
    WIDE: gl.constexpr = 2 if GLU.gated else 1  # columns of W1 for one of a
    steps = gl.cdiv(depth, TILE.block_k)
    position = 0
    for tile in range(gl.program_id(0), walk[4], gl.num_programs(0)):
        expert, row0, row_end, col_tile = find_tile(tile, walk, TILE)
        acc = sum_tile(ring, position, steps, False, LOADS.k_contiguous, LOADS.gather, M, WIDE * I, TILE.block_k)
        position += steps
        col0 = col_tile * I
        h_place = clipped_rows(row0, gl.minimum(row_end, h_rows))
        if LOADS.bias:
            lane = gl.arange(0, WIDE * I, gl.SliceLayout(0, acc.type.layout))
            if GLU.gated and not GLU.interleaved:  # gate's columns, then up's
                col = col0 + lane % I
                col = gl.where(col < intermediate, col + (lane // I) * intermediate, 2 * intermediate)
            else:
                col = WIDE * col0 + lane
            bias = bias_ptr + expert.to(gl.int64) * (WIDE * intermediate) + col
            acc += gl.load(bias, mask=col < WIDE * intermediate, other=0.0).to(gl.float32)[None, :]
        if STORES.h and (GLU.interleaved or not GLU.gated):
            store_tile(h_desc, staging, acc, h_place, (), WIDE * col0, 0)
        if GLU.gated:
            if GLU.interleaved:
                gate, up = acc.reshape([M, I, 2]).split()
            else:
                gate, up = halves(acc)
                if STORES.h:
                    store_tile(h_desc, staging, gate, h_place, (0,), col0, 0)
                    store_tile(h_desc, staging, up, h_place, (1,), col0, 0)
            a, _, _ = glu(gate, up, GLU)
        else:
            a, _ = activation(acc, GLU)
        if STORES.a:
            store_tile(a_desc, staging, a, clipped_rows(row0, row_end), (), col0, 0)
    tma.store_wait(0)


@cached_launch
@gluon.jit(do_not_specialize=["h_rows"])
def up_projection(
    x_src,
    w_desc,
    h_desc,
    a_desc,
    bias_ptr,
    place_ptr,
    tile_expert_ptr,
    tile_offset_ptr,
    expert_offset_ptr,
    num_experts,
    hidden,
    intermediate,
    top_k,
    stride_x,
    h_rows,
    LOADS: gl.constexpr,
    GLU: gl.constexpr,
    STORES: gl.constexpr,
    TILE: gl.constexpr,
):
    """h[row] = x[token(row)] @ W1[e].T (+ bias[e]), and a = act(h). x_src: x if LOADS.gather, else x gathered."""
    PAIRED: gl.constexpr = GLU.gated and not GLU.interleaved
    STEP: gl.constexpr = 2 * TILE.block_n if GLU.gated and GLU.interleaved else TILE.block_n
    ready, free = make_barriers(TILE.num_stages, 1 + GATHERING_THREADS if LOADS.gather else 1)
    if LOADS.gather:
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        SHAPE: gl.constexpr = [TILE.num_stages, TILE.block_p, TILE.block_k]
        x_ring = gl.allocate_shared_memory(a_desc.dtype, SHAPE, LAYOUT)
    else:
        x_ring = make_ring(x_src, TILE.num_stages)
    ring = x_ring, make_ring(w_desc, TILE.num_stages), ready, free
    staging = make_ring(a_desc, 256 // TILE.block_p)
    cols = gl.cdiv(intermediate, TILE.block_n)
    walk = tile_expert_ptr, tile_offset_ptr, expert_offset_ptr, cols, gl.load(tile_offset_ptr + num_experts) * cols
    # fmt: off
    if LOADS.gather:
        gl.warp_specialize([
            (_finish_up, (h_desc, a_desc, bias_ptr, staging, ring, walk, hidden, intermediate, h_rows,
                          LOADS, GLU, STORES, TILE)),
            (_gather_rows, (x_src, w_desc, ring, walk, place_ptr, hidden, stride_x, top_k,
                            PAIRED, STEP, LOADS, TILE)),
        ], [4], [56])
    else:
        gl.warp_specialize([
            (_finish_up, (h_desc, a_desc, bias_ptr, staging, ring, walk, hidden, intermediate, h_rows,
                          LOADS, GLU, STORES, TILE)),
            (_load_rows, (x_src, w_desc, ring, walk, place_ptr, hidden, stride_x, top_k,
                          PAIRED, STEP, LOADS, TILE)),
        ], [1], [24])
    # fmt: on
