"""Whether the ranks of a group send rows of one kind: K, H, and the dtypes of rows and routing weights.

A row travels as bytes. A rank with another K or dtype would read the others' bytes at the wrong places, and compute
with what it finds there. So each rank's kind goes with the numbers that travel before the rows anyway, as a short
number of its own; where they differ, every rank sees it, and raises.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from accel_moe.dispatch.memory import UNKNOWN

_BITS = 20
_MOST = 2 ** (62 - _BITS) - 1  # 4 TiB: more than a GPU has


class Kind(NamedTuple):
    """Of the rows that a rank sends."""

    top_k: int
    hidden: int
    dtype: torch.dtype
    weights_dtype: torch.dtype

    def describe(self) -> str:
        return f"top_k {self.top_k}, hidden size {self.hidden}, {self.dtype} rows, {self.weights_dtype} routing weights"


def kind_of(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Kind:
    return Kind(top_k_index.shape[1], hidden_states.shape[1], hidden_states.dtype, top_k_weights.dtype)


@functools.lru_cache(maxsize=64)
def number_of(kind: Kind) -> int:
    """The same on every rank; below 2**20."""
    return zlib.crc32(repr(tuple(kind)).encode()) % 2**_BITS


def with_free_bytes(kind: Kind, free: int) -> int:
    """Both in one number, below 2**62: it travels in the place of the bytes."""
    return number_of(kind) * (_MOST + 1) + min(max(0, free), _MOST)


def apart(number: int) -> tuple[int, int]:
    """number_of and the free bytes in what `with_free_bytes` made."""
    kind, free = divmod(number, _MOST + 1)
    return kind, UNKNOWN if free == _MOST else free


def check(numbers: Sequence[int], kind: Kind, group: dist.ProcessGroup) -> None:
    """numbers: of the group's ranks, in order; the same on all of them.

    Raises:
        ValueError: they differ; on every rank of the group, after one more collective for the words.
    """
    if len(set(numbers)) == 1:
        return
    kinds: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(kinds, kind.describe(), group=group)
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(kinds):
        ranks.setdefault(found, []).append(dist.get_global_rank(group, rank))
    listed = "; ".join(f"{found} on rank {', '.join(map(str, who))}" for found, who in ranks.items())
    raise ValueError(
        f"The ranks of an ep group called an experts layer with rows of different kinds: {listed}. Expected one kind "
        "on all of them. Give every rank the same model, top-k and precision (autocast, or the router's dtype)."
    )
