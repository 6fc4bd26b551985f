"""Parts that hopper.py, hopper_backward.py and hopper_gradients.py share: the ring and its barriers, the sum over it, a
tile's place and its store; and Gluon's functions that had other names until Triton 3.6.
"""

# pyright: reportAssignmentType=false
# In a kernel, `gl.constexpr` after a name says that it is a constant, not which type it has.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .tile_loads import locate_tile

# their names until Triton 3.6, and later ones
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
gather_in = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
reinterpret = getattr(gl.shared_memory_descriptor, "_reinterpret", None) or gl.shared_memory_descriptor.reinterpret
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

MANY = gl.constexpr(2**30)  # more rows than there are
GATHERING_THREADS = gl.constexpr(128)  # of a loader that gathers rows

# ---- The ring


@gluon.jit
def make_ring(desc, STAGES: gl.constexpr):
    shape: gl.constexpr = [STAGES] + desc.block_type.shape  # noqa: RUF005 - Triton reads no other form
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


@gluon.jit
def make_barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr, USERS: gl.constexpr = 1):
    """-> ready, which waits for as many arrivals, and free, which waits for as many finishers."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):  # pyright: ignore
        mbarrier.init(ready.index(i), count=ARRIVALS)
        mbarrier.init(free.index(i), count=USERS)
    fence_async_shared()  # the copy engine counts on these barriers
    return ready, free


@gluon.jit
def next_step(stage, phase, STAGES: gl.constexpr):
    """-> the next buffer of the ring, and the phase of its barriers."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def right_operand(buffer, N: gl.constexpr, K: gl.constexpr, K_CONTIGUOUS: gl.constexpr):
    """[K, N] of a buffer that holds [N, K] if K_CONTIGUOUS."""
    if K_CONTIGUOUS:
        right = buffer.reshape([N, K]).permute((1, 0))
    else:
        right = buffer.reshape([K, N])
    return right


@gluon.jit
def sum_tile(
    ring,
    position,
    steps,
    TRANSPOSE: gl.constexpr,
    K_CONTIGUOUS: gl.constexpr,
    FENCE: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
):
    """The finisher's part of one tile: [M, N] in fp32, the sum over `steps` buffers of the ring from `position` on.

    TRANSPOSE: left tiles are [K, M]. K_CONTIGUOUS: right tiles are [N, K]. FENCE: left tiles came by ordinary copies.
    """
    left_ring, right_ring, ready, free = ring
    STAGES: gl.constexpr = left_ring.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    acc = gl.zeros([M, N], gl.float32, LAYOUT)
    stage = position % STAGES
    phase = (position // STAGES) & 1
    for k in range(steps):
        mbarrier.wait(ready.index(stage), phase)
        if FENCE:
            fence_async_shared()
        left = left_ring.index(stage)
        if TRANSPOSE:
            left = left.permute((1, 0))
        right = right_operand(right_ring.index(stage), N, K, K_CONTIGUOUS)
        acc = warpgroup_mma(left, right, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # The product before this one is done. Its buffer's number is computed, not kept in a variable: Triton 3.6 does
        # not see that such a copy of `stage` changes in the loop.
        mbarrier.arrive(free.index(gl.where(stage == 0, STAGES, stage) - 1), count=1, pred=k > 0)
        stage, phase = next_step(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(free.index(gl.where(stage == 0, STAGES, stage) - 1), count=1, pred=steps > 0)
    return acc


@gluon.jit
def sum_part(
    rows_ring,
    w_ring,
    bars,
    position,
    steps,
    WHICH: gl.constexpr,
    K_CONTIGUOUS: gl.constexpr,
    FENCE: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
):
    """As sum_tile, for one of the finishers that share a ring: rows_ring has a buffer for each of them in each stage.

    What differs from sum_tile: the step before the first product is given back here, too, once its buffer is stored.
    """
    ready, free = bars
    M: gl.constexpr = rows_ring.shape[1]
    STAGES: gl.constexpr = w_ring.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    acc = gl.zeros([M, N], gl.float32, LAYOUT)
    stage = position % STAGES
    phase = (position // STAGES) & 1
    for k in range(steps):
        mbarrier.wait(ready.index(stage), phase)
        if FENCE:
            fence_async_shared()
        right = right_operand(w_ring.index(stage), N, K, K_CONTIGUOUS)
        acc = warpgroup_mma(rows_ring.index(rows_ring.shape[0] // STAGES * stage + WHICH), right, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # The step before this one is done: a product, or the last columns of the tile before, once they are stored.
        tma.store_wait(0)
        mbarrier.arrive(free.index(gl.where(stage == 0, STAGES, stage) - 1), count=1, pred=position + k > 0)
        stage, phase = next_step(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(free.index(gl.where(stage == 0, STAGES, stage) - 1), count=1)
    return acc


# ---- Stores


@gluon.jit
def halves(tile):
    M: gl.constexpr = tile.shape[0]
    N: gl.constexpr = tile.shape[1]
    return tile.reshape([M, 2, N // 2]).permute(0, 2, 1).split()


@gluon.jit
def store_tile(desc, staging, tile, before, after, col, SLOT: gl.constexpr):
    """tile [M, N] to columns col .. of desc, the other coordinates being `before` and, between them and the column,
    `after`. As many columns at a time as the staging buffers are wide, which take turns."""
    M: gl.constexpr = tile.shape[0]
    N: gl.constexpr = tile.shape[1]
    SLOTS: gl.constexpr = staging.shape[0]
    WIDTH: gl.constexpr = desc.block_type.shape[-1]
    if N > WIDTH:
        left, right = halves(tile)
        store_tile(desc, staging, left, before, after, col, SLOT)
        store_tile(desc, staging, right, before, after, col + N // 2, (SLOT + N // 2 // WIDTH) % SLOTS)
    else:
        tma.store_wait(SLOTS - 1)  # the copy engine has read what was in this buffer
        buffer = staging.index(SLOT)
        buffer.reshape([M, N]).store(tile.to(desc.dtype))
        fence_async_shared()
        copy_out(desc, before + after + (col,), buffer.reshape(desc.block_type.shape))


@gluon.jit
def clipped_rows(row0, end):
    """The coordinates of rows row0 .. end in a clipped tensor."""
    return MANY, end, MANY - (end - row0)


# ---- A tile's place and its weight


@gluon.jit
def find_tile(pid, walk, TILE: gl.constexpr):
    tile_expert_ptr, tile_offset_ptr, expert_offset_ptr, num_col_tiles, _ = walk
    expert = gl.load(tile_expert_ptr + pid // num_col_tiles)
    row0, row_end, col_tile = locate_tile(pid, expert, tile_offset_ptr, expert_offset_ptr, num_col_tiles, TILE)
    return expert, row0, row_end, col_tile


@gluon.jit
def copy_weight(w_desc, bar, buffer, expert, col, k, PAIRED: gl.constexpr, LOADS: gl.constexpr):
    if PAIRED:
        copy_in(w_desc, [expert, 0, col, k], bar, buffer)
    elif LOADS.k_contiguous:
        copy_in(w_desc, [expert, col, k], bar, buffer)
    else:
        copy_in(w_desc, [expert, k, col], bar, buffer)
