"""Triton kernels: a stable counting sort of slots by expert, without atomics, and its tiles; in one launch for few
slots (sort_few_slots), in two for many.

Letters and terms are gemm.py's.
"""

import triton
import triton.language as tl

from .cached_launch import cached_launch

SORT_CHUNK = tl.constexpr(128)
COUNT_CHUNK = tl.constexpr(1024)  # slots that sort_few_slots counts at once


@triton.jit
def bins_of(expert, num_experts):
    """The bin of each slot: its expert, or E for any other number, however far out or below zero. What follows writes
    at places that the bins give: a number that is none of them must not get there."""
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)


@cached_launch
@triton.jit(do_not_specialize=["num_slots", "slots_per_block"])
def count_slots(index_ptr, count_ptr, num_slots, num_experts, slots_per_block, BINS: tl.constexpr):
    """count[block, e] = slots of this block that chose expert e. Sentinels count as bin E."""
    block = tl.program_id(0)
    counts = tl.zeros((BINS,), tl.int32)
    for chunk in range(0, slots_per_block, SORT_CHUNK):
        slot = block * slots_per_block + chunk + tl.arange(0, SORT_CHUNK)
        expert = tl.load(index_ptr + slot, mask=slot < num_slots, other=num_experts)
        counts += tl.histogram(bins_of(expert, num_experts), BINS)
    tl.store(count_ptr + block * BINS + tl.arange(0, BINS), counts)


@cached_launch
@triton.jit(do_not_specialize=["num_slots"])
def add_counts(index_ptr, total_ptr, num_slots, num_experts, BINS: tl.constexpr, SLOTS: tl.constexpr):
    """total[e] += slots that chose expert e. By atomics: whole numbers add up to the same in any order."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    expert = tl.load(index_ptr + slot, mask=slot < num_slots, other=num_experts)
    counts = tl.histogram(bins_of(expert, num_experts), BINS)
    bins = tl.arange(0, BINS)
    tl.atomic_add(total_ptr + bins, counts.to(tl.int64), mask=(bins < num_experts) & (counts > 0), sem="relaxed")


@triton.jit
def count_between(index_ptr, first, end, num_experts, BINS: tl.constexpr):
    """Slots of each expert from first up to end."""
    counts = tl.zeros((BINS,), tl.int32)
    for chunk in range(first, end, COUNT_CHUNK):
        slot = chunk + tl.arange(0, COUNT_CHUNK)
        expert = tl.load(index_ptr + slot, mask=slot < end, other=num_experts)
        counts += tl.histogram(bins_of(expert, num_experts), BINS)
    return counts


@triton.jit
def place_block(
    index_ptr,
    row_slot_ptr,
    slot_row_ptr,
    first,
    slots_per_block,
    place,
    num_slots,
    num_rows,
    num_experts,
    BINS: tl.constexpr,
):
    """row_slot and slot_row of the slots from first on; place: by expert, the row of the first of them."""
    for chunk in range(0, slots_per_block, SORT_CHUNK):
        lane = tl.arange(0, SORT_CHUNK)
        slot = first + chunk + lane
        expert = tl.load(index_ptr + slot, mask=slot < num_slots, other=num_experts)
        expert = bins_of(expert, num_experts)
        # Stable: a slot comes after the earlier slots of the same expert.
        rank = tl.sum(((expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])).to(tl.int32), axis=1)
        row = tl.gather(place, expert, 0) + rank
        used = (expert < num_experts) & (row < num_rows)
        tl.store(slot_row_ptr + slot, tl.where(used, row, -1), mask=slot < num_slots)
        tl.store(row_slot_ptr + row, slot, mask=used)
        place += tl.histogram(expert, BINS)


@cached_launch
@triton.jit(do_not_specialize=["num_slots", "num_rows", "slots_per_block", "num_blocks"])
def place_slots(
    index_ptr,
    count_ptr,
    row_slot_ptr,
    slot_row_ptr,
    expert_offset_ptr,
    num_slots,
    num_rows,
    num_experts,
    slots_per_block,
    num_blocks,
    BINS: tl.constexpr,
):
    """row_slot[row] = slot, its inverse slot_row[slot] = row (-1 for a sentinel), and expert_offsets[E + 1]."""
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    before = tl.zeros((BINS,), tl.int32)  # slots of each expert in earlier blocks
    total = tl.zeros((BINS,), tl.int32)
    for other in range(0, num_blocks):
        counts = tl.load(count_ptr + other * BINS + bins)
        total += counts
        before += tl.where(other < block, counts, 0)
    total = tl.where(bins < num_experts, total, 0)
    offset = tl.cumsum(total, 0) - total
    if block == 0:
        # num_rows bounds what is written here and below, and so in every kernel after: a host that understates
        # num_pairs loses the last slots, it does not make us write past a buffer.
        tl.store(expert_offset_ptr + bins, tl.minimum(offset, num_rows), mask=bins <= num_experts)
    first, place = block * slots_per_block, offset + before
    place_block(
        index_ptr, row_slot_ptr, slot_row_ptr, first, slots_per_block, place, num_slots, num_rows, num_experts, BINS
    )


@cached_launch
@triton.jit(do_not_specialize=["num_slots", "num_rows", "slots_per_block", "max_tiles"])
def sort_few_slots(
    index_ptr,
    row_slot_ptr,
    slot_row_ptr,
    expert_offset_ptr,
    tile_expert_ptr,
    tile_offset_ptr,
    num_slots,
    num_rows,
    num_experts,
    slots_per_block,
    max_tiles,
    BLOCK_P: tl.constexpr,
    BINS: tl.constexpr,
    TILES: tl.constexpr,
):
    """place_slots and list_tiles; each block counts all slots by itself."""
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    first = block * slots_per_block
    before = count_between(index_ptr, 0, first, num_experts, BINS)
    total = before + count_between(index_ptr, first, num_slots, num_experts, BINS)
    total = tl.where(bins < num_experts, total, 0)
    offset = tl.cumsum(total, 0) - total
    start = tl.minimum(offset, num_rows)  # as in place_slots
    if block == 0:
        tl.store(expert_offset_ptr + bins, start, mask=bins <= num_experts)
    place = offset + before
    place_block(
        index_ptr, row_slot_ptr, slot_row_ptr, first, slots_per_block, place, num_slots, num_rows, num_experts, BINS
    )
    rows = tl.minimum(offset + total, num_rows) - start
    for tile in range(block * TILES, max_tiles, tl.num_programs(0) * TILES):
        write_tiles(tile_expert_ptr, tile_offset_ptr, rows, tile, num_experts, max_tiles, BLOCK_P, BINS, TILES)


@triton.jit
def write_tiles(
    tile_expert_ptr,
    tile_offset_ptr,
    rows,
    first,
    num_experts,
    max_tiles,
    BLOCK_P: tl.constexpr,
    BINS: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES entries of tile_expert, from first on; and tile_offsets, if that is 0. rows: of each expert."""
    bins = tl.arange(0, BINS)
    is_expert = bins < num_experts
    tiles = tl.where(is_expert, (rows + BLOCK_P - 1) // BLOCK_P, 0)
    last = tl.cumsum(tiles, 0)
    if first == 0:
        tl.store(tile_offset_ptr + 1 + bins, last, mask=is_expert)
        tl.store(tile_offset_ptr + bins, last - tiles, mask=bins == 0)
    tile = first + tl.arange(0, TILES)
    expert = tl.sum((is_expert[None, :] & (last[None, :] <= tile[:, None])).to(tl.int32), axis=1)
    tl.store(tile_expert_ptr + tile, tl.where(expert < num_experts, expert, -1), mask=tile < max_tiles)


@cached_launch
@triton.jit(do_not_specialize=["max_tiles", "max_others"])
def list_tiles(
    expert_offset_ptr,
    tile_expert_ptr,
    tile_offset_ptr,
    other_expert_ptr,
    other_offset_ptr,
    largest_first_ptr,
    num_experts,
    max_tiles,
    max_others,
    BLOCK_P: tl.constexpr,
    OTHER_P: tl.constexpr,
    BINS: tl.constexpr,
    TILES: tl.constexpr,
):
    """tile_expert[i] = expert of row tile i (-1 past the last); tile_offsets[e] = first row tile of expert e;
    largest_first = the experts by their rows, those with equally many in their own order. The second row of programs
    writes the others, of height OTHER_P."""
    bins = tl.arange(0, BINS)
    start = tl.load(expert_offset_ptr + bins, mask=bins < num_experts, other=0)
    rows = tl.load(expert_offset_ptr + bins + 1, mask=bins < num_experts, other=0) - start
    first = tl.program_id(0) * TILES
    if tl.program_id(1) == 0:
        write_tiles(tile_expert_ptr, tile_offset_ptr, rows, first, num_experts, max_tiles, BLOCK_P, BINS, TILES)
        expert = first + tl.arange(0, TILES)
        own = tl.load(expert_offset_ptr + expert + 1, mask=expert < num_experts, other=0)
        own -= tl.load(expert_offset_ptr + expert, mask=expert < num_experts, other=0)
        before = (rows[None, :] > own[:, None]) | ((rows[None, :] == own[:, None]) & (bins[None, :] < expert[:, None]))
        rank = tl.sum((before & (bins < num_experts)[None, :]).to(tl.int32), axis=1)
        tl.store(largest_first_ptr + rank, expert, mask=expert < num_experts)
    else:
        write_tiles(other_expert_ptr, other_offset_ptr, rows, first, num_experts, max_others, OTHER_P, BINS, TILES)
