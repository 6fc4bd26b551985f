"""gemm.py's weight_grad for Hopper, in Gluon.

A grid, a loader, a finisher and a ring as in hopper.py.
"""

# pyright: reportAssignmentType=false
# In a kernel, `gl.constexpr` after a name says that it is a constant, not which type it has.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from .cached_launch import cached_launch
from .hopper_parts import (
    GATHERING_THREADS,
    copy_in,
    gather_in,
    make_barriers,
    make_ring,
    next_step,
    store_tile,
    sum_tile,
)


@gluon.jit
def _find_gradient(tile, experts, tiles_m, tiles_n, group_m, TILE: gl.constexpr):
    """experts: largest_first and expert_offsets."""
    largest_first_ptr, expert_offset_ptr = experts
    expert = gl.load(largest_first_ptr + tile // (tiles_m * tiles_n))
    local = tile % (tiles_m * tiles_n)
    group = local // (group_m * tiles_n)
    group_rows = gl.minimum(tiles_m - group * group_m, group_m)
    local -= group * group_m * tiles_n
    m0 = (group * group_m + local % group_rows) * TILE.block_k
    n0 = (local // group_rows) * TILE.block_n
    return expert, m0, n0, gl.load(expert_offset_ptr + expert), gl.load(expert_offset_ptr + expert + 1)


@gluon.jit
def _load_row_blocks(
    x_desc,
    other_desc,
    ring,
    experts,
    pad_tile_ptr,
    num_tiles,
    tiles_m,
    tiles_n,
    group_m,
    LEFT: gl.constexpr,
    PAD: gl.constexpr,
    TILE: gl.constexpr,
):
    """The loader. Beyond the expert's last row the padded x has zeros, and the other operand finite numbers."""
    left_ring, right_ring, ready, free = ring
    BYTES: gl.constexpr = x_desc.block_type.nbytes + other_desc.block_type.nbytes
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, m0, n0, start, end = _find_gradient(tile, experts, tiles_m, tiles_n, group_m, TILE)
        padding = gl.load(pad_tile_ptr + expert) * PAD - start  # from a row to the same row of the padded x
        for row in range(start, end, TILE.block_p):
            mbarrier.wait(free.index(stage), phase)
            bar = ready.index(stage)
            mbarrier.expect(bar, BYTES)
            if LEFT:
                copy_in(x_desc, [row + padding, m0], bar, left_ring.index(stage))
                copy_in(other_desc, [row, n0], bar, right_ring.index(stage))
            else:
                copy_in(x_desc, [row + padding, n0], bar, right_ring.index(stage))
                copy_in(other_desc, [row, m0], bar, left_ring.index(stage))
            stage, phase = next_step(stage, phase, TILE.num_stages)


@gluon.jit
def _gather_step(
    x_ptr,
    slot,
    col,
    width,
    stride,
    desc,
    desc_col,
    ring,
    stage,
    phase,
    row,
    left,
    TOP_K: gl.constexpr,
    LEFT: gl.constexpr,
):
    """A step of _gather_row_blocks: rows x[token] of these slots, zeros where not `left`. -> next stage and phase."""
    left_ring, right_ring, ready, free = ring
    STAGES: gl.constexpr = left_ring.shape[0]
    mbarrier.wait(free.index(stage), phase)
    bar = ready.index(stage)
    mbarrier.expect(bar, desc.block_type.nbytes)
    pointers = x_ptr + (((slot // TOP_K) * stride)[:, None] + col[None, :])
    mask = left[:, None] & (col < width)[None, :]
    if LEFT:
        copy_in(desc, [row, desc_col], bar, right_ring.index(stage))
        gather_in(left_ring.index(stage), pointers, mask)
    else:
        copy_in(desc, [row, desc_col], bar, left_ring.index(stage))
        gather_in(right_ring.index(stage), pointers, mask)
    async_copy.mbarrier_arrive(bar, increment_count=False)  # of each thread, once its copies are done
    return next_step(stage, phase, STAGES)


@gluon.jit
def _gather_row_blocks(
    x_ptr,
    desc,
    ring,
    experts,
    row_slot_ptr,
    num_tiles,
    tiles_m,
    tiles_n,
    group_m,
    width,
    stride,
    TOP_K: gl.constexpr,
    LEFT: gl.constexpr,
    TILE: gl.constexpr,
):
    """The loader, rows x[token] of one operand by asynchronous copies of 16 bytes: the left one if LEFT.

    A step's slots are loaded two steps before, or it would wait for memory twice. So steps come in twos, each with
    slots of its own: a value that goes from one variable to another is waited for. Offsets in x have 32 bits: with 64
    the kernel takes a tenth more.
    """
    ROWS: gl.constexpr = TILE.block_p
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    lane = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, TILE.block_k if LEFT else TILE.block_n, gl.SliceLayout(0, LAYOUT))
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _, m0, n0, start, end = _find_gradient(tile, experts, tiles_m, tiles_n, group_m, TILE)
        col = (m0 if LEFT else n0) + column
        desc_col = n0 if LEFT else m0
        even = gl.load(row_slot_ptr + start + lane, mask=start + lane < end, other=0)
        odd = gl.load(row_slot_ptr + start + ROWS + lane, mask=start + ROWS + lane < end, other=0)
        for row in range(start, end, 2 * ROWS):
            left = row + lane < end
            stage, phase = _gather_step(
                x_ptr, even, col, width, stride, desc, desc_col, ring, stage, phase, row, left, TOP_K, LEFT
            )
            even = gl.load(row_slot_ptr + row + 2 * ROWS + lane, mask=row + 2 * ROWS + lane < end, other=0)
            if row + ROWS < end:
                left = row + ROWS + lane < end
                stage, phase = _gather_step(
                    x_ptr, odd, col, width, stride, desc, desc_col, ring, stage, phase, row + ROWS, left, TOP_K, LEFT
                )
                odd = gl.load(row_slot_ptr + row + 3 * ROWS + lane, mask=row + 3 * ROWS + lane < end, other=0)


@gluon.jit
def _finish_gradient(
    dw_desc,
    staging,
    ring,
    experts,
    num_tiles,
    tiles_m,
    tiles_n,
    group_m,
    scale,
    FENCE: gl.constexpr,
    TILE: gl.constexpr,
):
    M: gl.constexpr = TILE.block_k
    position = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, m0, n0, start, end = _find_gradient(tile, experts, tiles_m, tiles_n, group_m, TILE)
        steps = gl.cdiv(end - start, TILE.block_p)
        acc = sum_tile(ring, position, steps, True, False, FENCE, M, TILE.block_n, TILE.block_p)
        position += steps
        store_tile(dw_desc, staging, acc * scale, (expert, m0), (), n0, 0)
    tma.store_wait(0)


@gluon.jit
def _ring_of_rows(
    src, dtype: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, GATHER: gl.constexpr
):
    if GATHER:
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, WIDTH], LAYOUT)
    else:
        ring = make_ring(src, STAGES)
    return ring


@cached_launch
@gluon.jit
def weight_grad(
    x_src,
    other_desc,
    dw_desc,
    largest_first_ptr,
    expert_offset_ptr,
    place_ptr,
    num_experts,
    left_width,
    right_width,
    stride_x,
    scale,
    group_m,
    GATHER: gl.constexpr,
    LEFT: gl.constexpr,
    TOP_K: gl.constexpr,
    PAD: gl.constexpr,
    TILE: gl.constexpr,
):
    """dw[e] = scale * left[rows of e].T @ right[rows of e]; zeros for an idle expert.

    One operand is x[token], the left one if LEFT: x_src is x if GATHER, else x gathered. place: the rows' slots if
    GATHER, else the experts' first padded tiles.

    The experts with the most rows come first, so that the programs end together: all tiles of an expert cost alike, and
    each program's share of the tiles is fixed.
    """
    STAGES: gl.constexpr = TILE.num_stages
    ready, free = make_barriers(STAGES, 1 + GATHERING_THREADS if GATHER else 1)
    WIDTH: gl.constexpr = TILE.block_k if LEFT else TILE.block_n
    x_ring = _ring_of_rows(x_src, other_desc.dtype, STAGES, TILE.block_p, WIDTH, GATHER)
    if LEFT:
        ring = x_ring, make_ring(other_desc, STAGES), ready, free
    else:
        ring = make_ring(other_desc, STAGES), x_ring, ready, free
    staging = make_ring(dw_desc, 256 // TILE.block_k)
    tiles_m = gl.cdiv(left_width, TILE.block_k)
    tiles_n = gl.cdiv(right_width, TILE.block_n)
    tiles = num_experts * tiles_m * tiles_n
    experts = largest_first_ptr, expert_offset_ptr
    # fmt: off
    if GATHER:
        gl.warp_specialize([
            (_finish_gradient, (dw_desc, staging, ring, experts, tiles, tiles_m, tiles_n, group_m, scale, True, TILE)),
            (_gather_row_blocks, (x_src, other_desc, ring, experts, place_ptr, tiles, tiles_m, tiles_n, group_m,
                                  left_width if LEFT else right_width, stride_x, TOP_K, LEFT, TILE)),
        ], [4], [56])
    else:
        gl.warp_specialize([
            (_finish_gradient, (dw_desc, staging, ring, experts, tiles, tiles_m, tiles_n, group_m, scale, False, TILE)),
            (_load_row_blocks, (x_src, other_desc, ring, experts, place_ptr, tiles, tiles_m, tiles_n, group_m,
                                LEFT, PAD, TILE)),
        ], [1], [24])
    # fmt: on
