"""How evenly a layer's slots fall on its experts: four numbers a layer, and their means over the layers.

Counts go in, [E] for each layer; a flat dict of floats comes out, as `accelerator.log` and every tracker take it. The
maximal violation is that of the auxiliary-loss-free balancing paper (Wang et al. 2024, arXiv:2408.15664, section 4.1).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from accel_moe.experts.expert_counts import trained_tokens_per_expert

PREFIX = "expert_load/"


@dataclass(frozen=True)
class LayerLoad:
    """The load of one layer's E experts.

    Attributes:
        busiest_share: the busiest expert's share of the layer's slots, from 1/E (even) to 1.
        max_violation: the busiest expert's slots over the mean, less 1: from 0 (even) to E - 1.
        entropy: that of the shares, over log E: from 0 (all slots on one expert) to 1 (even).
        dead_experts: how many experts got no slot.
    """

    busiest_share: float
    max_violation: float
    entropy: float
    dead_experts: int

    @classmethod
    def of(cls, counts: torch.Tensor) -> LayerLoad:
        """From an [E] tensor of slots for each expert, at least one of them above 0."""
        shares = counts.double() / counts.sum()
        busiest, num_experts = float(shares.max()), counts.numel()
        entropy = float(torch.special.entr(shares).sum()) / math.log(num_experts) if num_experts > 1 else 1.0
        return cls(busiest, busiest * num_experts - 1, entropy, int((counts == 0).sum()))


NUMBERS = tuple(field.name for field in dataclasses.fields(LayerLoad))


def expert_load_metrics(model: nn.Module) -> dict[str, float]:
    """How evenly training's tokens fell on the experts since the last call, for `accelerator.log`. A collective.

    Evaluation, which is forwards without gradients of a model in eval mode, is left out and dropped. The function and
    `tokens_per_expert` take the same counts: what one has returned, the other no longer counts.

    Returns:
        {"expert_load/layer_03/max_violation": 0.8, ..., "expert_load/max_violation": 0.7, ...}: the numbers of
        `LayerLoad` for each layer, their means over the layers, and the largest violation,
        "expert_load/worst_max_violation". Empty if no token was counted.

    Raises:
        ValueError: the model was not prepared.
    """
    return metrics_of(trained_tokens_per_expert(model, "expert_load_metrics"))


def metrics_of(counts: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """From {layer name: [E] slots}. A layer without any slot has no numbers."""
    labels = layer_labels(counts)
    loads = {labels[name]: LayerLoad.of(row) for name, row in counts.items() if row.sum() > 0}
    if not loads:
        return {}
    means = {name: sum(getattr(load, name) for load in loads.values()) / len(loads) for name in NUMBERS}
    metrics = {f"{PREFIX}{name}": float(mean) for name, mean in means.items()}
    metrics[f"{PREFIX}worst_max_violation"] = max(load.max_violation for load in loads.values())
    for label, load in loads.items():
        metrics |= {f"{PREFIX}{label}/{name}": float(getattr(load, name)) for name in NUMBERS}
    return metrics


def layer_labels(names: Mapping[str, object]) -> dict[str, str]:
    """{"model.layers.3.mlp.experts": "layer_03"}: the number in a layer's name; its place if that is not unique."""
    found = [re.search(r"\.(\d+)\.", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    if len(set(numbers)) < len(names):
        numbers = list(range(len(names)))
    width = max(2, len(str(max(numbers, default=0))))
    return {name: f"layer_{number:0{width}}" for name, number in zip(names, numbers)}


def is_of_one_layer(metric: str) -> bool:
    return metric.startswith(f"{PREFIX}layer_")
