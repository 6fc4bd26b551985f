"""Context parallelism's attention on a machine without a GPU: torch's ring attention has no kernel for the CPU.

Each rank gathers all keys and values of the sequence and attends to them from its own queries. The parts are torch's:
rank r of n holds the chunks r and 2 n - 1 - r of 2 n. The result is that of the ring, and takes the memory of whole
keys and values: for laptops, tutorials and tests.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


def positions_of(rank: int, size: int, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """[tokens] int64: the places in the sequence of the tokens that `rank` of `size` ranks holds."""
    half = tokens // 2
    steps = torch.arange(half, device=device)
    return torch.cat([rank * half + steps, (2 * size - 1 - rank) * half + steps])


_of_torch = functional.scaled_dot_product_attention


def attention(
    group: dist.ProcessGroup, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """[B, heads, T, D] each, of this rank's T tokens; the same of its output. A collective over `group`."""
    if attn_mask is not None or not options.pop("is_causal", False):
        raise ValueError(
            "Attention under context parallelism is causal and has no mask, but a layer gave one. Set "
            "parallelism_config_cp_size: 1 for this model."
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    places = positions_of(rank, size, query.shape[2])
    keys, values = _Gathered.apply(key, group), _Gathered.apply(value, group)
    seen = places[:, None] >= torch.arange(size * query.shape[2])
    return _of_torch(query, keys, values, attn_mask=seen, **options)


class _Gathered(torch.autograd.Function):
    """[B, heads, T, D] of each rank to [B, heads, size x T, D] in the order of the sequence."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, size = group, dist.get_world_size(group)
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, part.contiguous(), group=group)
        places = torch.cat([positions_of(rank, size, part.shape[2]) for rank in range(size)])
        return torch.cat(parts, dim=2).index_select(2, places.argsort())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].contiguous().clone()
        dist.all_reduce(whole, group=ctx.group)
        size = dist.get_world_size(ctx.group)
        places = positions_of(dist.get_rank(ctx.group), size, whole.shape[2] // size)
        return whole.index_select(2, places), None
