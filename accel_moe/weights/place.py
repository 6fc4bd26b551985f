"""The slices of a model's weights that this rank holds, and the memory that their values go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from accel_moe.experts.packing import Packing
from accel_moe.weights.deferred_tensors import Origin


@dataclass(frozen=True)
class Place:
    """The part of a weight that this rank holds.

    Attributes:
        local: [count, ...], the memory for rows first .. first + count of the weight.
        casts: the dtypes that values pass through on their way: a user cast the model before.
        packing: how a row is packed, where `local` has bytes, [count, bytes].
    """

    local: torch.Tensor
    first: int
    count: int
    casts: tuple[torch.dtype, ...] = ()
    packing: Packing | None = None

    @staticmethod
    def of(tensor: torch.Tensor) -> Place:
        if isinstance(tensor, DTensor):
            first, count = own_rows(
                tensor.shape[0], tensor.placements, tensor.device_mesh.shape, tensor.device_mesh.get_coordinate()
            )
            local = tensor._local_tensor
            assert local.shape[0] == count, (local.shape, first, count)
            return Place(local, first, count)
        local = tensor.detach()
        return Place(local, 0, local.shape[0] if local.dim() else 1)

    def rows(self, at: int, count: int, device: torch.device | None = None) -> Place:
        """The place of `count` of its rows, from its own row `at` on. That of packed rows is dense, and new memory on
        `device`, its own by default."""
        if self.packing is None:
            return replace(self, local=self.local[at : at + count], first=self.first + at, count=count)
        shape, device = (count, *self.packing.matrix), device or self.local.device
        dense = torch.empty(shape, dtype=self.packing.dtype, device=device)
        return Place(dense, self.first + at, count, self.casts)

    def pack(self, at: int, dense: torch.Tensor) -> None:
        """Its rows from `at` on get the values of `dense`, if they are packed; else they have them."""
        if self.packing is not None:
            for row, matrix in enumerate(dense, at):
                self.local[row].copy_(self.packing.pack(matrix))


def own_rows(rows: int, placements: Sequence[Any], mesh_shape: Sequence[int], coordinate: Any) -> tuple[int, int]:
    """(first, count) of the rows of dim 0 that a rank holds. Pure.

    Plain shards cut first, left to right; a strided one (FSDP over what ep has cut) after them. Each cut is
    torch.chunk's: ceil(rows / ranks) to each rank, the last ones less or none.
    """
    first = 0
    strided = [type(p).__name__ == "_StridedShard" for p in placements]
    assert sum(strided) <= 1, placements
    for late in (False, True):
        for placement, is_late, size, at in zip(placements, strided, mesh_shape, coordinate):
            if placement.is_replicate() or is_late is not late:
                continue
            if placement.dim != 0:
                raise ValueError(f"placements {tuple(placements)}: only dim 0 can be sharded while loading")
            step = -(-rows // size)
            first += min(at * step, rows)
            rows = max(0, min(step, rows - at * step))
    return first, rows


def places_of(
    tensors: Mapping[str, torch.Tensor], origins: Mapping[str, Origin], packings: Mapping[str, Packing]
) -> list[dict[str, Place]]:
    """Weight of the files → its place. One mapping; one more for each time that the model has a weight again, copied.

    Args:
        tensors: the model's parameters and buffers by name.
        origins: name in the model → the weight of the files that the tensor stands for.
        packings: name in the model → how a packed weight is packed.
    """
    places: dict[str, dict[int, Place]] = {}
    for name, tensor in tensors.items():
        if (origin := origins.get(name)) is not None:
            place = replace(Place.of(tensor), casts=origin.casts, packing=packings.get(name))
            places.setdefault(origin.name, {})[id(tensor)] = place
    count = max((len(of_one) for of_one in places.values()), default=0)
    found: list[dict[str, Place]] = [{} for _ in range(count)]
    for name, of_one in places.items():
        for at, place in enumerate(of_one.values()):
            found[at][name] = place
    return found
