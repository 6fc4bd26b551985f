"""Which row of work each routed slot becomes, and which tiles those rows make: all on the device, no host
sync.

In: `top_k_index[T, K]`. Out: `Routing`, the sort by expert and its inverse, and from it `Tiles` for a tile
height. Shapes of buffers depend only on what the host knows (T, K, E and, if given, num_pairs), never on the
values, so that the layer can be captured in a CUDA graph. The sort is stable: two runs, or a recomputation
under checkpointing, give the same rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import sort
from .arithmetic import cdiv, power_of_2

_SORT_BLOCKS = 128  # about one per multiprocessor: each block re-reads the counts of all the others
_FEW_SLOTS, _FEW_BLOCKS = 16384, 64  # one launch, whose blocks count all slots each
_TILES = 64  # tiles that a program lists at once


class Routing(NamedTuple):
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


class Tiles(NamedTuple):
    """Row tiles of one height, none shared by two experts. int32, on the device."""

    tile_expert: Tensor  # [max_tiles] expert of each row tile, -1 past the last
    tile_offsets: Tensor  # [E + 1] first row tile of each expert
    block_p: int
    largest_first: Tensor | None = None  # [E] the experts by their rows; None if made by `sort_and_tile`

    @property
    def max_tiles(self) -> int:
        return self.tile_expert.numel()


def sort_slots(top_k_index: Tensor, num_experts: int, num_rows: int) -> Routing:
    """Sorts the slots of top_k_index[T, K] by expert; an index outside 0..num_experts-1 is a sentinel, without a row.

    num_rows: how many rows buffers hold, at least the number of slots that are not sentinels.
    """
    return sort_and_tile(top_k_index, num_experts, num_rows, block_p=_TILES)[0]


def sort_and_tile(top_k_index: Tensor, num_experts: int, num_rows: int, block_p: int) -> tuple[Routing, Tiles | None]:
    """The same, and its tiles of block_p if they cost no launch of their own."""
    num_slots, device = top_k_index.numel(), top_k_index.device
    routing = Routing(
        row_slot=torch.empty(num_rows, dtype=torch.int32, device=device),
        slot_row=torch.empty(num_slots, dtype=torch.int32, device=device),
        expert_offsets=torch.empty(num_experts + 1, dtype=torch.int32, device=device),
        top_k=top_k_index.shape[1],
    )
    bins, index = power_of_2(num_experts + 1), top_k_index.contiguous()
    most = _FEW_BLOCKS if num_slots <= _FEW_SLOTS else _SORT_BLOCKS
    chunk = sort.SORT_CHUNK.value
    slots_per_block = max(1, cdiv(num_slots, most * chunk)) * chunk
    num_blocks = max(1, cdiv(num_slots, slots_per_block))
    written = index, routing.row_slot, routing.slot_row, routing.expert_offsets
    sizes = num_slots, num_rows, num_experts, slots_per_block
    if num_slots <= _FEW_SLOTS:
        tiles = _empty_tiles(routing, block_p)
        sort.sort_few_slots[(num_blocks,)](
            *written,
            tiles.tile_expert,
            tiles.tile_offsets,
            *sizes,
            tiles.max_tiles,
            BLOCK_P=block_p,
            BINS=bins,
            TILES=_TILES,
        )
        return routing, tiles
    counts = torch.empty(num_blocks, bins, dtype=torch.int32, device=device)
    sort.count_slots[(num_blocks,)](index, counts, num_slots, num_experts, slots_per_block, BINS=bins)
    sort.place_slots[(num_blocks,)](index, counts, *written[1:], *sizes, num_blocks, BINS=bins)
    return routing, None


def _empty_tiles(routing: Routing, block_p: int) -> Tiles:
    num_experts, device = routing.num_experts, routing.row_slot.device
    return Tiles(
        tile_expert=torch.empty(
            routing.num_rows // block_p + min(routing.num_rows, num_experts), dtype=torch.int32, device=device
        ),
        tile_offsets=torch.empty(num_experts + 1, dtype=torch.int32, device=device),
        block_p=block_p,
    )


def list_tiles(routing: Routing, block_p: int, other_p: int = 0) -> tuple[Tiles, Tiles]:
    """Cuts every expert's rows into tiles of block_p, and into others of other_p, by default the same."""
    largest_first = torch.empty_like(routing.expert_offsets[1:])
    tiles = others = _empty_tiles(routing, block_p)._replace(largest_first=largest_first)
    if other_p and other_p != block_p:
        others = _empty_tiles(routing, other_p)._replace(largest_first=largest_first)
    if most := max(tiles.max_tiles, others.max_tiles, routing.num_experts):
        sort.list_tiles[(cdiv(most, _TILES), 1 if others is tiles else 2)](
            routing.expert_offsets,
            tiles.tile_expert,
            tiles.tile_offsets,
            others.tile_expert,
            others.tile_offsets,
            largest_first,
            routing.num_experts,
            tiles.max_tiles,
            others.max_tiles,
            BLOCK_P=block_p,
            OTHER_P=others.block_p,
            BINS=power_of_2(routing.num_experts),
            TILES=_TILES,
        )
    return tiles, others
