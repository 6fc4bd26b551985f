"""Which row of work each routed slot becomes, and which tiles those rows make: all on the device, no host
sync.

In: `top_k_index[T, K]`. Out: `Routing`, the sort by expert and its inverse, and from it `Tiles` for a tile
height. Shapes of buffers depend only on what the host knows (T, K, E and, if given, num_pairs), never on the
values, so that the layer can be captured in a CUDA graph. The sort is stable: two runs, or a recomputation
under checkpointing, give the same rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import sort
from .arithmetic import cdiv, power_of_2

_SORT_BLOCKS = 128  # about one per multiprocessor: each block re-reads the counts of all the others


@dataclass(frozen=True)
class Routing:
    """The sort of T*K slots by expert. int32, on the device of the indices."""

    row_slot: Tensor  # [num_rows] slot (t*K + k) of each row; undefined past expert_offsets[E]
    slot_row: Tensor  # [T*K] row of each slot, -1 for a sentinel
    expert_offsets: Tensor  # [E + 1] first row of each expert
    top_k: int

    @property
    def num_rows(self) -> int:
        """P: rows that buffers must hold; those in use may be fewer when sentinels were not counted by the
        caller.
        """
        return self.row_slot.numel()

    @property
    def num_experts(self) -> int:
        return self.expert_offsets.numel() - 1


@dataclass(frozen=True)
class Tiles:
    """Row tiles of one height, none shared by two experts. int32, on the device."""

    tile_expert: Tensor  # [max_tiles] expert of each row tile, -1 past the last
    tile_offsets: Tensor  # [E + 1] first row tile of each expert
    block_p: int

    @property
    def max_tiles(self) -> int:
        return self.tile_expert.numel()


def sort_slots(top_k_index: Tensor, num_experts: int, num_rows: int) -> Routing:
    """Sorts the slots of top_k_index[T, K] by expert; an index outside 0..num_experts-1 is a sentinel, without a row.

    num_rows: how many rows buffers hold, at least the number of slots that are not sentinels.
    """
    num_slots, device = top_k_index.numel(), top_k_index.device
    routing = Routing(
        row_slot=torch.empty(num_rows, dtype=torch.int32, device=device),
        slot_row=torch.empty(num_slots, dtype=torch.int32, device=device),
        expert_offsets=torch.empty(num_experts + 1, dtype=torch.int32, device=device),
        top_k=top_k_index.shape[1],
    )
    bins = power_of_2(num_experts + 1)
    chunk = sort.SORT_CHUNK.value
    slots_per_block = max(1, cdiv(num_slots, _SORT_BLOCKS * chunk)) * chunk
    num_blocks = max(1, cdiv(num_slots, slots_per_block))
    counts = torch.empty(num_blocks, bins, dtype=torch.int32, device=device)
    index = top_k_index.contiguous()
    grid = (num_blocks,)
    sort.count_slots[grid](index, counts, num_slots, num_experts, slots_per_block, BINS=bins)
    sort.place_slots[grid](
        index,
        counts,
        routing.row_slot,
        routing.slot_row,
        routing.expert_offsets,
        num_slots,
        num_rows,
        num_experts,
        slots_per_block,
        num_blocks,
        BINS=bins,
    )
    return routing


def list_tiles(routing: Routing, block_p: int) -> Tiles:
    """Cuts every expert's rows into tiles of block_p."""
    num_experts, device = routing.num_experts, routing.row_slot.device
    max_tiles = routing.num_rows // block_p + min(routing.num_rows, num_experts)
    tiles = Tiles(
        tile_expert=torch.empty(max_tiles, dtype=torch.int32, device=device),
        tile_offsets=torch.empty(num_experts + 1, dtype=torch.int32, device=device),
        block_p=block_p,
    )
    if max_tiles:
        slots = 64
        sort.list_tiles[(cdiv(max_tiles, slots),)](
            routing.expert_offsets,
            tiles.tile_expert,
            tiles.tile_offsets,
            num_experts,
            max_tiles,
            BLOCK_P=block_p,
            BINS=power_of_2(num_experts),
            TILES=slots,
        )
    return tiles
