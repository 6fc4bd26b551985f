"""How many slots were routed to each expert, in training and in evaluation.

A layer counts on its own device, in one launch a forward and without a host sync. Evaluation has counts of its own: a
forward without gradients of a layer in eval mode. Neither sign alone would do. Reentrant activation checkpointing runs
training's forward without gradients, and frozen experts may stay in eval mode while the rest of the model trains.
"""

from __future__ import annotations

import torch
from torch import nn

from accel_moe import whereabouts
from accel_moe.experts.state import LayerState, swapped_layers


def tokens_per_expert(model: nn.Module) -> dict[str, torch.Tensor]:
    """Slots routed to each expert since the last call, summed over all ranks, then set back to zero.

    Evaluation's are among them. A collective when torch.distributed is initialised: every rank calls it at the same
    point.

    Returns:
        {layer name: [E] int64 on the CPU}. The sum of one layer's row is tokens x K over all ranks and forwards
        (a forward that activation checkpointing runs again is counted once). With ep 1, a forward that torch.compile
        compiled is not counted.

    Raises:
        ValueError: the model was not prepared.
    """
    return _taken(model, "tokens_per_expert", evaluation=True)


expert_load = tokens_per_expert
"""The older name."""


def trained_tokens_per_expert(model: nn.Module, caller: str) -> dict[str, torch.Tensor]:
    """The same without evaluation's, which are dropped. `caller` is the public function that errors name."""
    return _taken(model, caller, evaluation=False)


def _taken(model: nn.Module, caller: str, evaluation: bool) -> dict[str, torch.Tensor]:
    layers = dict(swapped_layers(model))
    if not layers:
        raise ValueError(f"{caller}() got a model that accel_moe.prepare() has not seen. Call prepare(model) first.")
    whereabouts.meet(f"accel_moe.{caller}")
    device = next(iter(layers.values())).down_proj.device
    empty = torch.zeros(0, dtype=torch.long, device=device)
    rows = []
    for layer in layers.values():
        state = layer._accel_moe_layer
        kinds = (state.tokens_per_expert, state.evaluated_per_expert if evaluation else None)
        counted = [counts.to(device) for counts in kinds if counts is not None]
        rows.append(sum(counted[1:], counted[0]) if counted else empty.new_zeros(state.num_experts))
    forget_counts(model)
    flat = torch.cat(rows)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
    return dict(zip(layers, flat.cpu().split([row.numel() for row in rows])))


def forget_counts(model: nn.Module) -> None:
    """Sets this rank's counts back to zero. Not a collective."""
    for _, layer in swapped_layers(model):
        layer._accel_moe_layer.tokens_per_expert = layer._accel_moe_layer.evaluated_per_expert = None


@torch.no_grad()
def count_tokens(layer: LayerState, top_k_index: torch.Tensor, evaluates: bool) -> None:
    """Adds a forward's slots [T, K] to the layer's counts; to evaluation's if it `evaluates`. Forwards that a CUDA
    graph captures are not counted."""
    if torch.compiler.is_compiling():
        return  # the graph would break at the next line
    if torch._C._current_graph_task_id() != -1:
        return  # inside a backward: activation checkpointing is running this forward again
    if top_k_index.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a CUDA graph would go on counting into this memory when nobody has it any more
    name = "evaluated_per_expert" if evaluates else "tokens_per_expert"
    before = getattr(layer, name)
    if layer.kernel == "scattermoe" and top_k_index.is_cuda:
        from accel_moe.kernels.launch_passes import add_counts  # imports Triton

        if before is None or before.device != top_k_index.device:
            before = torch.zeros(layer.num_experts, dtype=torch.long, device=top_k_index.device)
            setattr(layer, name, before)
        add_counts(top_k_index, before)
        return
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
    # a new tensor: the old one may come from inference mode
    setattr(layer, name, counts if before is None else before + counts)
