"""The rows x[token] of a backward: read through the routing by a GEMM's own loads, or copied first.

in:   x [T, H] and its routing
out:  Gathered, which copies when a GEMM first asks for `padded`; tile lists, by height
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from . import passes
from .arithmetic import cdiv, power_of_2
from .routing import Routing, Tiles, list_tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PAD = 64  # rows; weight_grad's blocks must divide it


class TileLists:
    """Tile lists by height, each made once per op call.

    together: heights that are likely to be asked for; one launch then makes a first one and one of these.
    """

    def __init__(self, routing: Routing, made: Tiles | None = None, together: Iterable[int] = ()):
        self.routing, self._together = routing, together
        self._by_height = {} if made is None else {made.block_p: made}

    def __getitem__(self, block_p: int) -> Tiles:
        if block_p not in self._by_height:
            other = next((p for p in self._together if p != block_p and p not in self._by_height), 0)
            tiles, others = list_tiles(self.routing, block_p, other)
            self._by_height.update({tiles.block_p: tiles, others.block_p: others})
        return self._by_height[block_p]

    @property
    def largest_first(self) -> Tensor:
        """[E] int32, the experts by their rows."""
        made = (tiles.largest_first for tiles in self._by_height.values())
        found = next((order for order in made if order is not None), None)
        return list_tiles(self.routing, PAD)[0].largest_first if found is None else found  # pyright: ignore


class Padded(NamedTuple):
    """x[token] by rows, each expert's padded with zero rows to a multiple of `tiles.block_p` (passes.place_rows)."""

    data: Tensor  # [tiles.max_tiles * tiles.block_p, H]
    tiles: Tiles


class Gathered:
    """x[token] by rows, of x [T, H]."""

    def __init__(self, x: Tensor, routing: Routing, tiles: TileLists):
        self.x, self.routing, self.tiles = x, routing, tiles

    @functools.cached_property
    def padded(self) -> Padded:
        """A copy of all rows."""
        return _copy(self.x, self.routing, self.tiles)

    @property
    def loadable(self) -> bool:
        """Whether the loaders of hopper_backward.py and hopper_gradients.py can gather the rows: whole steps of 64
        columns, copies of 16 bytes, offsets of 32 bits."""
        stride, width = self.x.stride(0), self.x.shape[1]
        aligned = self.x.data_ptr() % 16 == 0 and stride % 16 == 0 and self.x.stride(1) == 1
        return aligned and width % 64 == 0 and 0 < self.x.shape[0] * stride < 2**31


def _copy(x: Tensor, routing: Routing, tiles: TileLists) -> Padded:
    """x [T, H] -> each row's token, padded per expert."""
    pad, width = tiles[PAD], x.shape[1]
    out = x.new_empty(pad.max_tiles * PAD, width)
    place = routing.slot_row.new_empty(routing.slot_row.shape)
    block = min(power_of_2(width), 64 if INTERPRETED else 2048)
    if out.numel():
        passes.place_rows[(pad.max_tiles,)](
            out,
            place,
            routing.row_slot,
            pad.tile_expert,
            pad.tile_offsets,
            routing.expert_offsets,
            width,
            PAD=PAD,
            BLOCK=block,
            num_warps=4,
        )
        passes.spread_rows[(x.shape[0], cdiv(width, block))](
            x,
            out,
            routing.slot_row,
            place,
            width,
            x.stride(0),
            TOP_K=routing.top_k,
            BLOCK=block,
            num_warps=4,
        )
    return Padded(out, pad)
