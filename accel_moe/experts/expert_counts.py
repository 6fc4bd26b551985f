"""How many slots were routed to each expert."""

from __future__ import annotations

import torch
from torch import nn

from accel_moe import whereabouts
from accel_moe.experts.state import LayerState, swapped_layers


def tokens_per_expert(model: nn.Module) -> dict[str, torch.Tensor]:
    """Slots routed to each expert since the last call, summed over all ranks, then set back to zero.

    A collective when torch.distributed is initialised: every rank calls it at the same point.

    Returns:
        {layer name: [E] int64 on the CPU}. The sum of one layer's row is tokens x K over all ranks and forwards
        (a forward that activation checkpointing runs again is counted once). With ep 1, a forward that torch.compile
        compiled is not counted.

    Raises:
        ValueError: the model was not prepared.
    """
    layers = dict(swapped_layers(model))
    if not layers:
        raise ValueError(
            "tokens_per_expert() got a model that accel_moe.prepare() has not seen. Call prepare(model) first."
        )
    whereabouts.meet("accel_moe.tokens_per_expert")
    device = next(iter(layers.values())).down_proj.device
    empty = torch.zeros(0, dtype=torch.long, device=device)
    rows = []
    for layer in layers.values():
        state = layer._accel_moe_layer
        counted = state.tokens_per_expert
        rows.append(empty.new_zeros(state.num_experts) if counted is None else counted.to(device))
        state.tokens_per_expert = None
    flat = torch.cat(rows)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
    return dict(zip(layers, flat.cpu().split([row.numel() for row in rows])))


expert_load = tokens_per_expert
"""The older name."""


@torch.no_grad()
def count_tokens(layer: LayerState, top_k_index: torch.Tensor) -> None:
    if torch.compiler.is_compiling():
        return  # the graph would break at the next line
    if torch._C._current_graph_task_id() != -1:
        return  # inside a backward: activation checkpointing is running this forward again
    size = layer.num_experts + 1  # the last one takes slots without an expert
    if top_k_index.is_cuda and not torch.are_deterministic_algorithms_enabled():
        # One kernel and no sync; it leaves out what is above max. Its counts are exact, but torch refuses it where it
        # was asked for determinism.
        counts = torch.histc(top_k_index.long(), bins=size, min=0, max=layer.num_experts)
    else:
        index = top_k_index.reshape(-1).long().clamp(max=layer.num_experts)
        index = index.masked_fill(index < 0, layer.num_experts)
        counts = torch.zeros(size, dtype=torch.long, device=index.device).scatter_add_(0, index, torch.ones_like(index))
    counts = counts[: layer.num_experts]
    if layer.tokens_per_expert is None:
        layer.tokens_per_expert = counts
    else:
        layer.tokens_per_expert = layer.tokens_per_expert + counts  # the old one may come from inference mode
