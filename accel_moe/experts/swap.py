"""The swap: experts modules get our forward, in place."""

from __future__ import annotations

import functools

from torch import nn

from accel_moe.experts.adapters import adopt_adapters
from accel_moe.experts.layer import ScatterMoE
from accel_moe.experts.recognise import FoundExperts
from accel_moe.experts.state import LayerState, PreparedState
from accel_moe.experts.view import as_interface, shim_of
from accel_moe.kernels.glu import gate_of


def swap(modules: dict[str, nn.Module], prepared: PreparedState) -> None:
    """Give each module our forward, in place; and what PEFT wrapped around it, under ep, what `LendsLowRank` says.

    Raises:
        ValueError: ep > 1, and an adapter on the experts that cannot be trained over several ranks, or two layers that
            share a weight.
    """
    if prepared.config.moe_ep_degree > 1:
        _refuse_tied(modules)
    if prepared.config.moe_ep_degree > 1 and isinstance(modules, FoundExperts):
        adopt_adapters(modules)
    for module in modules.values():
        layout = as_interface(module)
        # a gate of the module's own is tried now, where torch.compile does not look
        gate = gate_of(layout) if prepared.kernel == "scattermoe" else None
        module._accel_moe_layer = LayerState(prepared, layout.num_experts, prepared.kernel, shim_of(module), gate)
        module.__class__ = _swapped_class(module.__class__)


def recompute_refusal(module: nn.Module, kernel: str) -> str | None:
    """Why its up-projection cannot be computed again in backward, or None."""
    if kernel != "scattermoe":
        return f"moe_recompute_up_projection needs moe_kernel scattermoe, and it would run {kernel}. Leave it out"
    if gate_of(as_interface(module)) is None:
        return (
            "moe_recompute_up_projection needs a gate that our kernels know; its own is plain torch, which keeps what "
            "it needs for its backward. Leave it out, or use activation checkpointing"
        )
    return None


def _refuse_tied(modules: dict[str, nn.Module]) -> None:
    """Each layer's experts become shards of its own: a weight that two layers share would silently become two."""
    owner: dict[int, str] = {}
    for layer, module in modules.items():
        for name, parameter in module.named_parameters():
            if (first := owner.setdefault(id(parameter), f"{layer}.{name}")) != f"{layer}.{name}":
                raise ValueError(
                    f"{first} and {layer}.{name} are one weight (tied experts), which moe_ep_degree > 1 cannot keep "
                    "tied. Use moe_ep_degree: 1."
                )


@functools.cache
def _swapped_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"ScatterMoE{cls.__name__}", (ScatterMoE, cls), {"__module__": cls.__module__})
