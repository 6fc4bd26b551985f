"""gemm.py's down_backward for Hopper, in Gluon: the gradient of the down-projection's rows.

A grid, a loader and a ring as in hopper.py, which has the other GEMMs. A tile is 128 rows x 256 columns. Its sum over
the depth is followed in the ring by its columns of h, 64 of `a` at a time: one step of the ring, whose place for rows
takes those of gate, and whose place for the weight those of up and, in the end, of sa. dh is written over h. So h comes
as early as an operand does, and needs no memory of its own.

    finishers   two of one warpgroup, each with half of the tile's rows, so that one's waits are the other's work

What follows the sum is a loop over the columns, as short as can be (60 kB of code). Unrolled, the kernel was 158 kB,
and a tile of Qwen3's took 56 us; with 124 kB of code, 34 us.

launch_hopper.py launches this kernel. Letters, terms and the order of every sum are gemm.py's.
"""

# pyright: reportAssignmentType=false
# In a kernel, `gl.constexpr` after a name says that it is a constant, not which type it has.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma

from .activation import activation, glu
from .cached_launch import cached_launch
from .hopper_parts import (
    GATHERING_THREADS,
    clipped_rows,
    copy_in,
    copy_out,
    copy_weight,
    find_tile,
    gather_in,
    halves,
    make_barriers,
    make_ring,
    next_step,
    reinterpret,
    sum_part,
)
from .tile_loads import locate_tile

FINISHERS = gl.constexpr(2)
COLUMNS = gl.constexpr(64)  # of `a` in a step
ROWS_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def _load_backward(
    dout_src,
    w_desc,
    h_desc,
    ring,
    walk,
    place_ptr,
    depth,
    intermediate,
    top_k,
    stride_dout,
    GLU: gl.constexpr,
    LOADS: gl.constexpr,
    TILE: gl.constexpr,
):
    """The loader: of each tile the operands, then h. dout_src and place: as down_backward's."""
    dout_ring, w_ring, ready, free = ring
    M: gl.constexpr = TILE.block_p
    N: gl.constexpr = TILE.block_n
    K: gl.constexpr = TILE.block_k
    STAGES: gl.constexpr = TILE.num_stages
    BYTES: gl.constexpr = w_desc.block_type.nbytes + (0 if LOADS.gather else M * K * 2)
    H_BYTES: gl.constexpr = h_desc.block_type.nbytes * (2 if GLU.gated else 1)
    up_ring = reinterpret(w_ring, w_ring.dtype, [2 * STAGES, M, COLUMNS], ROWS_LAYOUT)
    if LOADS.gather:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
        lane = gl.arange(0, M, gl.SliceLayout(1, LAYOUT))
        column = gl.arange(0, K, gl.SliceLayout(0, LAYOUT))
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), walk[4], gl.num_programs(0)):
        expert, row0, row_end, col_tile = find_tile(tile, walk, TILE)
        if LOADS.gather:
            # A row past the expert's end reads token 0: real memory, and clipped at the store.
            slot = gl.load(place_ptr + row0 + lane, mask=row0 + lane < row_end, other=0)
            rows = dout_src + (slot // top_k).to(gl.int64)[:, None] * stride_dout + column[None, :]
        else:
            dout_row = row0 + gl.load(place_ptr + expert) * LOADS.pad - gl.load(walk[2] + expert)
        for k in range(0, depth, K):
            mbarrier.wait(free.index(stage), phase)
            bar = ready.index(stage)
            mbarrier.expect(bar, BYTES)
            copy_weight(w_desc, bar, w_ring.index(stage), expert, col_tile * N, k, False, LOADS)
            if LOADS.gather:
                gather_in(dout_ring.index(stage), rows + k)
                async_copy.mbarrier_arrive(bar, increment_count=False)  # of each thread, once its copies are done
            else:
                copy_in(dout_src, [dout_row, k], bar, dout_ring.index(stage))
            stage, phase = next_step(stage, phase, STAGES)
        for col in range(col_tile * N, gl.minimum(col_tile * N + N, intermediate), COLUMNS):
            mbarrier.wait(free.index(stage), phase)
            bar = ready.index(stage)
            mbarrier.expect(bar, H_BYTES)
            if GLU.gated and not GLU.interleaved:
                copy_in(h_desc, [row0, 0, col], bar, dout_ring.index(stage).reshape(h_desc.block_type.shape))
                copy_in(h_desc, [row0, 1, col], bar, up_ring.index(2 * stage).reshape(h_desc.block_type.shape))
            elif GLU.gated:
                copy_in(h_desc, [row0, 2 * col], bar, dout_ring.index(stage))
                copy_in(h_desc, [row0, 2 * col + COLUMNS], bar, up_ring.index(2 * stage))
            else:
                copy_in(h_desc, [row0, col], bar, dout_ring.index(stage))
            if LOADS.gather:
                async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_step(stage, phase, STAGES)


# ---- What follows the sum


@gluon.jit
def _eighths(tile):
    """-> the left and the right half of each quarter of the columns."""
    left, right = halves(tile)
    a, b = halves(left)
    c, d = halves(right)
    a0, a1 = halves(a)
    b0, b1 = halves(b)
    c0, c1 = halves(c)
    d0, d1 = halves(d)
    return (a0, b0, c0, d0), (a1, b1, c1, d1)


@gluon.jit
def _pick(c, tiles):
    a0, a1, a2, a3 = tiles
    return gl.where(c < 2, gl.where(c == 0, a0, a1), gl.where(c == 2, a2, a3))


@gluon.jit
def _gradients(da, scale, gate_buffer, up_buffer, GLU: gl.constexpr):
    """da [M, N] and h in shared memory -> its share of ds [M], sa, and dh's columns of gate and of up."""
    LAYOUT: gl.constexpr = da.type.layout
    dtype: gl.constexpr = gate_buffer.dtype
    if GLU.gated and GLU.interleaved:
        M: gl.constexpr = da.shape[0]
        N: gl.constexpr = da.shape[1]
        PAIRS: gl.constexpr = gl.join(da, da).reshape([M, 2 * N]).type.layout
        gate, up = gate_buffer.load(PAIRS).to(gl.float32).reshape([M, N, 2]).split()
        a, from_gate, from_up = glu(gl.convert_layout(gate, LAYOUT), gl.convert_layout(up, LAYOUT), GLU)
    elif GLU.gated:
        gate, up = gate_buffer.load(LAYOUT).to(gl.float32), up_buffer.load(LAYOUT).to(gl.float32)
        a, from_gate, from_up = glu(gate, up, GLU)
    else:
        a, from_gate = activation(gate_buffer.load(LAYOUT).to(gl.float32), GLU)
        from_up = from_gate
    ds = gl.sum(da * a, axis=1)
    da = da * scale[:, None]
    return ds, (a * scale[:, None]).to(dtype), (da * from_gate).to(dtype), (da * from_up).to(dtype)


@gluon.jit
def _put_gradients(gate_buffer, up_buffer, sa_buffer, sa, dgate, dup, GLU: gl.constexpr):
    # Gate's place is written last: it is an allocation of its own, so that the compiler's barrier before the first copy
    # out of it comes after every thread's fence.
    sa_buffer.store(sa)
    if GLU.gated and GLU.interleaved:
        gate_buffer.store(gl.join(dgate, dup).reshape(gate_buffer.shape))
    else:
        if GLU.gated:
            up_buffer.store(dup)
        gate_buffer.store(dgate)


@gluon.jit
def _write(desc, buffer, before, after, col):
    copy_out(desc, before + after + (col,), buffer.reshape(desc.block_type.shape))


@gluon.jit
def _backward_columns(
    da, scale, buffers, bars, descs, place, col0, intermediate, position, GLU: gl.constexpr, TILE: gl.constexpr
):
    """da [M, N] -> ds [M]; writes dh and sa from column col0 on. position: of h's columns in the ring."""
    first_ring, second_ring, WHICH = buffers
    ready, free = bars
    dh_desc, sa_desc = descs
    STAGES: gl.constexpr = TILE.num_stages
    PART: gl.constexpr = COLUMNS // 2  # columns at a time: of more, the registers do not hold what is computed
    lefts, rights = _eighths(da)
    ROW: gl.constexpr = gl.SliceLayout(1, lefts[0].type.layout)
    scale = gl.convert_layout(scale, ROW)
    ds = gl.zeros([da.shape[0]], gl.float32, ROW)
    for c in range(gl.cdiv(gl.minimum(intermediate - col0, TILE.block_n), COLUMNS)):
        stage = (position + c) % STAGES
        first = first_ring.index(FINISHERS * stage + WHICH)
        second = second_ring.index(2 * FINISHERS * stage + WHICH)
        sa_buffer = second_ring.index(2 * FINISHERS * stage + FINISHERS + WHICH)
        if GLU.gated and GLU.interleaved:
            gate0, gate1, up0, up1 = first, second, first, second
        else:
            gate0, gate1 = first.slice(0, PART, dim=1), first.slice(PART, PART, dim=1)
            up0, up1 = second.slice(0, PART, dim=1), second.slice(PART, PART, dim=1)
        mbarrier.wait(ready.index(stage), ((position + c) // STAGES) & 1)
        share, sa, dgate, dup = _gradients(_pick(c, lefts), scale, gate0, up0, GLU)
        ds += share
        tma.store_wait(0)  # the copy engine has read the columns before these
        mbarrier.arrive(free.index((position + c + STAGES - 1) % STAGES), count=1, pred=c > 0)
        _put_gradients(gate0, up0, sa_buffer.slice(0, PART, dim=1), sa, dgate, dup, GLU)
        share, sa, dgate, dup = _gradients(_pick(c, rights), scale, gate1, up1, GLU)
        ds += share
        _put_gradients(gate1, up1, sa_buffer.slice(PART, PART, dim=1), sa, dgate, dup, GLU)
        fence_async_shared()
        col = col0 + c * COLUMNS
        if GLU.gated and GLU.interleaved:
            _write(dh_desc, second, place, (), 2 * col + COLUMNS)
            _write(dh_desc, first, place, (), 2 * col)
        elif GLU.gated:
            _write(dh_desc, first, place, (0,), col)
            _write(dh_desc, second, place, (1,), col)
        else:
            _write(dh_desc, first, place, (), col)
        _write(sa_desc, sa_buffer, place, (), col)
    return ds


@gluon.jit
def _find_columns(tile, walk, TILE: gl.constexpr):
    """-> first row, end of the expert's rows, first column; a tile that is not there has no rows."""
    tile_expert_ptr, tile_offset_ptr, expert_offset_ptr, num_col_tiles, num_tiles = walk
    found = tile < num_tiles
    tile = gl.where(found, tile, 0)
    expert = gl.maximum(gl.load(tile_expert_ptr + tile // num_col_tiles), 0)  # -1: no expert has rows
    row0, row_end, col_tile = locate_tile(tile, expert, tile_offset_ptr, expert_offset_ptr, num_col_tiles, TILE)
    return row0, gl.where(found, row_end, row0), col_tile * TILE.block_n


@gluon.jit
def _finish_backward(
    WHICH: gl.constexpr,
    descs,
    weight_ptr,
    ds_ptr,
    row_slot_ptr,
    ring,
    walk,
    num_rows,
    depth,
    intermediate,
    LOADS: gl.constexpr,
    GLU: gl.constexpr,
    TILE: gl.constexpr,
):
    M: gl.constexpr = TILE.block_p // FINISHERS
    N: gl.constexpr = TILE.block_n
    STAGES: gl.constexpr = TILE.num_stages
    dout_ring, w_ring, ready, free = ring
    bars = ready, free
    dtype: gl.constexpr = dout_ring.dtype
    rows_ring = reinterpret(dout_ring, dtype, [FINISHERS * STAGES, M, COLUMNS], ROWS_LAYOUT)
    buffers = rows_ring, reinterpret(w_ring, dtype, [2 * FINISHERS * STAGES, M, COLUMNS], ROWS_LAYOUT), WHICH
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16]))
    lane = WHICH * M + gl.arange(0, M, ROW)
    steps = gl.cdiv(depth, TILE.block_k)
    position = 0
    row0, row_end, col0 = _find_columns(gl.program_id(0), walk, TILE)
    slot = gl.load(row_slot_ptr + row0 + lane, mask=row0 + lane < row_end, other=0)
    for tile in range(gl.program_id(0), walk[4], gl.num_programs(0)):
        scale = gl.load(weight_ptr + slot, mask=row0 + lane < row_end, other=0.0).to(gl.float32)
        da = sum_part(
            rows_ring, w_ring, bars, position, steps, WHICH, LOADS.k_contiguous, LOADS.gather, N, TILE.block_k
        )
        position += steps
        next_row, next_end, next_col = _find_columns(tile + gl.num_programs(0), walk, TILE)
        slot = gl.load(row_slot_ptr + next_row + lane, mask=next_row + lane < next_end, other=0)
        place = clipped_rows(row0 + WHICH * M, row_end)
        ds = _backward_columns(da, scale, buffers, bars, descs, place, col0, intermediate, position, GLU, TILE)
        position += gl.cdiv(gl.minimum(intermediate - col0, N), COLUMNS)
        ds_tile = ds_ptr + (col0 // N).to(gl.int64) * num_rows
        gl.store(ds_tile + row0 + lane, gl.convert_layout(ds, ROW), mask=row0 + lane < row_end)
        row0, row_end, col0 = next_row, next_end, next_col
    tma.store_wait(0)


@cached_launch
@gluon.jit(do_not_specialize=["num_rows"])
def down_backward(
    dout_src,
    w_desc,
    h_desc,
    dh_desc,
    sa_desc,
    weight_ptr,
    ds_ptr,
    place_ptr,
    row_slot_ptr,
    tile_expert_ptr,
    tile_offset_ptr,
    expert_offset_ptr,
    num_experts,
    num_rows,
    hidden,
    intermediate,
    top_k,
    stride_dout,
    GLU: gl.constexpr,
    LOADS: gl.constexpr,
    TILE: gl.constexpr,
):
    """da = dout[token] @ W2[e], kept in registers; writes dh as h, sa [P, I] and ds partials [column tiles, P].
    dh_desc and sa_desc have a finisher's rows.

    dout_src: dout if LOADS.gather, else dout gathered. place: the rows' slots if LOADS.gather, else the experts' first
    padded tiles.
    """
    gl.static_assert(TILE.block_n == 4 * COLUMNS and TILE.block_k == COLUMNS)
    ready, free = make_barriers(TILE.num_stages, 1 + GATHERING_THREADS if LOADS.gather else 1, FINISHERS)
    SHAPE: gl.constexpr = [TILE.num_stages, TILE.block_p, TILE.block_k]
    dout_ring = gl.allocate_shared_memory(sa_desc.dtype, SHAPE, ROWS_LAYOUT)
    ring = dout_ring, make_ring(w_desc, TILE.num_stages), ready, free
    cols = gl.cdiv(intermediate, TILE.block_n)
    walk = tile_expert_ptr, tile_offset_ptr, expert_offset_ptr, cols, gl.load(tile_offset_ptr + num_experts) * cols
    descs = dh_desc, sa_desc
    LOADERS: gl.constexpr = 4 if LOADS.gather else 1  # warps
    # fmt: off
    gl.warp_specialize([
        (_finish_backward, (0, descs, weight_ptr, ds_ptr, row_slot_ptr, ring, walk, num_rows, hidden, intermediate,
                            LOADS, GLU, TILE)),
        (_finish_backward, (1, descs, weight_ptr, ds_ptr, row_slot_ptr, ring, walk, num_rows, hidden, intermediate,
                            LOADS, GLU, TILE)),
        (_load_backward, (dout_src, w_desc, h_desc, ring, walk, place_ptr, hidden, intermediate, top_k, stride_dout,
                          GLU, LOADS, TILE)),
    ], [4, LOADERS], [224, 56] if LOADS.gather else [240, 24])
    # fmt: on
