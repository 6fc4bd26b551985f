"""What `prepare` decided for a model and for each of its experts layers, and the layers that carry it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accel_moe.config import MoEConfig, ResolvedConfig
from accel_moe.experts.packing import Packing
from accel_moe.experts.view import Shim
from accel_moe.kernels.glu import Glu
from accel_moe.kernels.hints import LowRank
from accel_moe.names import plain_name

if TYPE_CHECKING:
    from accel_moe.mesh import MeshPlan


@dataclass
class PreparedState:
    """What `prepare` decided for one model, shared by its layers and found as `model._accel_moe`.

    `mesh_plan` is None until the experts are sharded, inside `accelerator.prepare`.
    """

    resolved: ResolvedConfig
    kernel: str
    base_model: str | None
    model_type: str
    num_layers: int
    mesh_plan: MeshPlan | None = None

    @property
    def config(self) -> MoEConfig:
        return self.resolved.config

    @property
    def quantize(self) -> str | None:
        """How frozen experts are to be packed: "nf4", "int8", or None."""
        scheme = self.config.moe_quantize_experts
        return None if scheme == "none" else scheme


@dataclass
class LayerState:
    """One experts layer's own part of it."""

    prepared: PreparedState
    num_experts: int
    kernel: str
    shim: Shim | None = None
    glu: Glu | None = None
    """The gate, for our kernels."""
    dispatcher: Any = None
    """A Dispatcher. With ep > 1 it is NotSharded until `accelerator.prepare`."""
    fsdp_ignores_it: bool = False
    """It has nothing to gather or to reduce: no other rank holds these experts."""
    compute_dtype: torch.dtype | None = None
    """Set where FSDP ignores the layer, and so does not cast its weights."""
    handle: torch.Tensor | None = field(default=None, repr=False)
    """What stands for the layer in a compiled graph (in_graph.py)."""
    tokens_per_expert: torch.Tensor | None = field(default=None, repr=False)
    """[E] int64 on the layer's device: slots routed to each expert since counts were last taken (expert_counts.py)."""
    evaluated_per_expert: torch.Tensor | None = field(default=None, repr=False)
    """The same of evaluation, which the other leaves out."""
    pair_widths: tuple[int, int] | None = None
    """Values that a (row, expert) pair takes without and with a backward to come; read off the weights once."""
    cast_bytes: dict[torch.dtype, int] = field(default_factory=dict, repr=False)
    """What this rank's experts take in a dtype, where they are stored in another; read off them once."""
    deltas: dict[str, list[LowRank]] = field(default_factory=dict, repr=False)
    """LoRA on the experts: by parameter, the factors of all experts that its PEFT wrapper lends for a forward."""
    packed: dict[str, Packing] = field(default_factory=dict, repr=False)
    """By parameter, how it is packed (`moe_quantize_experts`); empty until `accelerator.prepare`."""

    def values_of(self, name: str, weight: torch.Tensor) -> int:
        """How many values a weight has, however it is stored."""
        how = self.packed.get(name)
        return weight.numel() if how is None else weight.shape[0] * how.numel

    @property
    def ep(self) -> int:
        return self.prepared.config.moe_ep_degree

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.ep

    @property
    def recompute_up(self) -> bool:
        return self.prepared.config.moe_recompute_up_projection

    @property
    def chunk_tokens(self) -> int:
        """Tokens in one exchange at most; 0: no limit."""
        return self.prepared.config.moe_dispatch_chunk_tokens or 0 if self.ep > 1 else 0

    @property
    def splits_identity_experts(self) -> bool:
        """Whether slots of identity experts are taken out before the experts function (identity.py)."""
        return self.shim is not None and self.shim.identity_experts and self.kernel != "eager"


def swapped_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """By the names that a state dict gives them, whatever wraps them."""
    for name, module in model.named_modules():
        if isinstance(vars(module).get("_accel_moe_layer"), LayerState):
            yield plain_name(name), module


def holds_experts(module: nn.Module) -> bool:
    """Whether it is a swapped layer, or has one in it."""
    return any(True for _ in swapped_layers(module))


def prepared_state(model: nn.Module) -> PreparedState | None:
    """The state `prepare` left on this model, however it was wrapped since (PEFT, compile, checkpointing)."""
    return next((layer._accel_moe_layer.prepared for _, layer in swapped_layers(model)), None)
