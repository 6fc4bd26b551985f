"""The swap: experts modules get our forward, in place."""

from __future__ import annotations

import functools

from torch import nn

from accel_moe.dispatch.base import Dispatcher
from accel_moe.dispatch.local import LocalDispatcher, NotSharded
from accel_moe.experts.adapters import adopt_adapters
from accel_moe.experts.identity import WithIdentityExperts
from accel_moe.experts.layer import ScatterMoE
from accel_moe.experts.recognise import FoundExperts
from accel_moe.experts.state import LayerState, PreparedState
from accel_moe.experts.view import as_interface, shim_of
from accel_moe.kernels.glu import glu_of


def swap(modules: dict[str, nn.Module], prepared: PreparedState) -> None:
    """Swap each module's class for one with our forward. Under ep, also adapt PEFT's LoRA wrappers around it (see
    `LendsLowRank`). Parameters, buffers, names and shapes stay as they are; no weight is copied.

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
        glu = glu_of(layout) if prepared.kernel == "scattermoe" else None
        layer = LayerState(prepared, layout.num_experts, prepared.kernel, shim_of(module), glu)
        layer.dispatcher = _first_dispatcher(type(module).__name__, layer)
        mixin = WithIdentityExperts if layer.splits_identity_experts else ScatterMoE
        module._accel_moe_layer = layer
        module.__class__ = _swapped_class(module.__class__, mixin)


def _first_dispatcher(name: str, layer: LayerState) -> Dispatcher:
    if layer.ep > 1:
        return NotSharded(f"ScatterMoE{name}", layer.ep)
    own_loop_knows_more = layer.shim is not None and layer.shim.identity_experts and layer.kernel == "eager"
    skips_strays = layer.kernel == "scattermoe" or layer.splits_identity_experts
    return LocalDispatcher(None if own_loop_knows_more else layer.num_experts, skips_strays)


def recompute_refusal(kernel: str) -> str | None:
    """Why the up-projection cannot be computed again in backward, or None."""
    if kernel != "scattermoe":
        return f"moe_recompute_up_projection needs moe_kernel scattermoe, and it would run {kernel}. Leave it out"
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
def _swapped_class(cls: type[nn.Module], mixin: type[ScatterMoE]) -> type[nn.Module]:
    return type(f"ScatterMoE{cls.__name__}", (mixin, cls), {"__module__": cls.__module__})
