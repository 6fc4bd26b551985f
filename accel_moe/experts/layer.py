"""The swap: experts modules get our forward, and the state that one forward needs.

The swap gives the module a class of ours, as `fully_shard` does (the two compose): parameters, buffers, names
and shapes stay as they are, no weight is copied. The new forward calls the registered experts function not on
the module but on an `ExpertsView` of it, which answers with local tensors and local counts; FSDP2 must go on
seeing the module's own DTensors. Which modules those are, recognise.py says.

What the module cannot know before the ranks exist (its dispatcher) is given by shard.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from accel_moe.dispatch.chunks import in_chunks
from accel_moe.dispatch.replay import runs_again
from accel_moe.experts.expert_counts import count_tokens
from accel_moe.experts.state import LayerState
from accel_moe.experts.view import (
    KNOWN_PARAMETERS,
    SHIMS,
    ExpertsView,
    as_interface,
    is_decorated,
    shim_answers,
)
from accel_moe.kernels import scattermoe
from accel_moe.kernels.casts import Casts
from accel_moe.kernels.deferred_count import LaterPairs

if TYPE_CHECKING:
    pass


class ScatterMoE(nn.Module):
    """The forward that every swapped experts module gets, mixed in before the module's own class."""

    _accel_moe_layer: LayerState

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H], [T, K], [T, K] to [T, H] in the dtype of hidden_states. A collective when ep > 1."""
        layer = self._accel_moe_layer
        if torch.compiler.is_dynamo_compiling() and layer.ep > 1:
            return _uncompiled(self, hidden_states, top_k_index, top_k_weights)
        routed, dtype = top_k_index, hidden_states.dtype
        compute_dtype = _compute_dtype(self, hidden_states)
        function = experts_function(layer.kernel, self)
        hidden_states = hidden_states.to(compute_dtype)
        passed = None
        if layer.shim is not None and layer.shim.identity_experts and layer.kernel != "eager":
            top_k_index, top_k_weights, passed = _split_identity(hidden_states, top_k_index, top_k_weights, layer)
        elif layer.ep == 1 and layer.kernel != "scattermoe":
            top_k_index, top_k_weights = _without_strays(top_k_index, top_k_weights, layer)
        if layer.ep == 1:
            count_tokens(layer, routed)
            out = function(_whole_view(self, layer, compute_dtype), hidden_states, top_k_index, top_k_weights)
        else:
            out = self._over_ranks(layer, function, hidden_states, top_k_index, top_k_weights, routed)
        return (out if passed is None else out + passed).to(dtype)

    def _over_ranks(
        self, layer: LayerState, function, hidden_states, top_k_index, top_k_weights, routed
    ) -> torch.Tensor:
        if layer.dispatcher is None:
            raise RuntimeError(
                f"{type(self).__name__} runs with moe_ep_degree={layer.ep} but its experts were never sharded. "
                "Pass the model through accelerator.prepare(model, optimizer) with FSDP2 before its first forward."
            )
        dispatcher, compute_dtype = layer.dispatcher, hidden_states.dtype
        bytes_per_pair = _bytes_per_pair(self, layer, compute_dtype)
        bytes_meanwhile = _bytes_of_casts(self, layer, compute_dtype)
        # a gate of the module's own computes on buffers of that size
        counted = layer.kernel == "scattermoe" and layer.gate is None
        views: list[ExpertsView] = []

        def make_ready() -> None:
            """What needs nothing of the exchange: the host does it while it would wait for the counts."""
            first = not views
            if first:
                views.append(_local_view(self, layer, compute_dtype))
            if (casts := views[0].casts) is not None:
                casts.prepare()
            if first:
                count_tokens(layer, routed)

        def there_and_back(hidden_states, top_k_index, top_k_weights):
            sent = dispatcher.dispatch(
                hidden_states,
                top_k_index,
                top_k_weights,
                bytes_per_pair=bytes_per_pair,
                meanwhile=make_ready,
                bytes_meanwhile=bytes_meanwhile,
                counted=counted,
            )
            if not views:
                make_ready()
            received = sent.rows if layer.kernel == "scattermoe" else sent.rows.contiguous()
            pairs = sent.num_pairs if isinstance(sent.num_pairs, int) else LaterPairs(sent.num_pairs, 1 / layer.ep)
            view = views[0].of(pairs, sent.rows_ready)
            rows = function(view, received, sent.local_index, sent.local_weights)
            # a forward that is run again makes casts of its own, and these would lie beside them
            again = None if view.casts is None or runs_again() else view.casts.prepare
            return dispatcher.combine(rows.to(compute_dtype), sent, meanwhile=again)

        if limit := layer.prepared.config.moe_dispatch_chunk_tokens:
            make_ready()  # before the chunks: they run again when PEFT lends no more
            return in_chunks(there_and_back, limit, dispatcher.group, (hidden_states, top_k_index, top_k_weights))
        return there_and_back(hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        layer = self._accel_moe_layer
        own = super().extra_repr()
        text = f"experts={layer.num_experts}, local={layer.num_local_experts}, ep={layer.ep}, kernel={layer.kernel}"
        return f"{own}, {text}" if own else text


@torch.compiler.disable(reason="the ranks of an ep group exchange tokens here")
def _uncompiled(module: ScatterMoE, *args: torch.Tensor) -> torch.Tensor:
    """The same forward, where torch.compile breaks its graph: an exchange is started and awaited by the host, and its
    sizes come from other ranks. What is around the experts is compiled."""
    return ScatterMoE.forward(module, *args)


def experts_function(kernel: str, module: nn.Module) -> Callable[..., torch.Tensor]:
    if kernel == "eager":
        return _eager_forward(next(c for c in type(module).__mro__ if ScatterMoE in c.__bases__))
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS[kernel]


class _ScaleWeightGradients(torch.autograd.Function):
    """Identity on a group of weights; multiplies their gradients."""

    @staticmethod
    def forward(ctx, scale: float, *weights: torch.Tensor):
        ctx.scale = scale
        return tuple(w.view_as(w) for w in weights)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        return None, *(g * ctx.scale for g in gradients)


def _split_identity(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, layer: LayerState
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots of identity experts become sentinels of weight 0; the third value is what they add to the output."""
    identity, nobody = top_k_index >= layer.num_experts, top_k_index < 0
    passed = top_k_weights.masked_fill(~identity, 0.0).sum(-1, keepdim=True)
    top_k_index = top_k_index.clamp(max=layer.num_experts).masked_fill(nobody, layer.num_experts)
    top_k_weights = top_k_weights.masked_fill(identity | nobody, 0.0)
    return top_k_index, top_k_weights, (hidden_states * passed).to(hidden_states.dtype)


def _without_strays(
    top_k_index: torch.Tensor, top_k_weights: torch.Tensor, layer: LayerState
) -> tuple[torch.Tensor, torch.Tensor]:
    """A slot whose number is no expert's becomes one of expert 0 with weight 0, which adds nothing and has no gradient.

    Our kernels skip such a slot themselves. Of transformers' functions grouped_mm takes a number below zero for a row
    of work, and shifts everybody's; the others stop at the first one, on a GPU with the whole device.
    """
    strays = top_k_index < 0
    if layer.shim is None or not layer.shim.identity_experts:  # whose own loop knows larger numbers
        strays = strays | (top_k_index >= layer.num_experts)
    return top_k_index.masked_fill(strays, 0), top_k_weights.masked_fill(strays, 0.0)


def _casts_of(
    module: ScatterMoE, layer: LayerState, weights: dict[str, torch.Tensor], dtype: torch.dtype, *, of_module: bool
) -> Casts | None:
    """For our fused kernels, which take weights as they are stored and write their gradients in that dtype; None where
    everything is in `dtype`, and for the others, whose weights are cast under autograd."""
    if all(w.dtype == dtype for w in weights.values()) or torch.compiler.is_compiling():
        return None
    if layer.gate is None or layer.deltas or layer.shim is not None:
        return None
    return Casts([weights[name] for name in scattermoe.parameter_names(module)], dtype, of_module)


def _whole_view(module: ScatterMoE, layer: LayerState, dtype: torch.dtype) -> ExpertsView:
    weights = dict(_floating_parameters(module))
    # PEFT computes them for the length of a forward
    casts = _casts_of(module, layer, weights, dtype, of_module=False)
    answers: dict[str, Any] = {name: w.to(dtype) if casts is None else w for name, w in weights.items()}
    if layer.shim is not None:
        answers.update(shim_answers(module, layer.shim))
        if layer.shim.identity_experts and layer.kernel != "eager":
            answers["gate_up_proj"] = answers["gate_up_proj"][: layer.num_experts]
            answers["_is_expert_parallel"] = True  # identity slots are sentinels now, which grouped_mm must skip
    return ExpertsView(module, casts=casts, known_gate=layer.gate, keep_h=layer.keep_h, **answers)


def _local_view(module: ScatterMoE, layer: LayerState, dtype: torch.dtype) -> ExpertsView:
    """The rank's own experts, under the 1/ep gradient scale.

    A rank's expert gradient is a sum over the tokens of its whole ep group, while the loss of each rank is a mean
    over its own tokens and FSDP averages over efsdp alone: without the factor expert gradients are ep times too
    large, and the gradient norm with them.
    """
    scale = 1.0 / layer.ep
    weights = dict(_floating_parameters(module))
    local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in weights.items()}
    casts = _casts_of(module, layer, local, dtype, of_module=True)
    if casts is None:
        local = {name: w.to(dtype) for name, w in local.items()}
    answers: dict[str, Any] = shim_answers(module, layer.shim) if layer.shim is not None else {}
    answers.update(num_experts=layer.num_local_experts, _is_expert_parallel=True)
    trained = [name for name, weight in local.items() if weight.requires_grad]
    if trained and (layer.deltas or layer.kernel != "scattermoe"):
        local.update(zip(trained, _ScaleWeightGradients.apply(scale, *(local[name] for name in trained))))
        scale = 1.0  # else our kernels apply the factor in the epilogue of their weight gradient
    for name, changes in layer.deltas.items():
        # lora_A and lora_B are dense: FSDP averages them over every rank, of which one per ep group has the gradient
        # of an expert, summed over the group. That is the mean over ranks: no factor here.
        first = weights[name].device_mesh.get_local_rank("ep") * layer.num_local_experts
        own = slice(first, first + layer.num_local_experts)
        for change in changes:
            left, right = change.left[own].to(dtype), change.right[own].to(dtype)
            local[name] = torch.baddbmm(local[name], left, right, alpha=change.scale)
    answers.update(weight_grad_scale=1.0 if layer.deltas else scale)
    return ExpertsView(module, casts=casts, known_gate=layer.gate, keep_h=layer.keep_h, **answers, **local)


def _bytes_per_pair(module: ScatterMoE, layer: LayerState, dtype: torch.dtype) -> int:
    """What one (row, expert) pair takes at least: the activation [I], and with a backward to come the pre-activation,
    [2I] or [I], too, whether it is kept for it or computed again."""
    if layer.pair_widths is None:
        layout: Any = as_interface(module)
        intermediate: int = layout.down_proj.shape[-2 if layout.is_transposed else -1]
        layer.pair_widths = intermediate, (3 if layout.has_gate else 2) * intermediate
    return layer.pair_widths[torch.is_grad_enabled()] * dtype.itemsize


def _bytes_of_casts(module: ScatterMoE, layer: LayerState, dtype: torch.dtype) -> int:
    """Of this rank's experts in dtype, where they are not in it already."""
    if dtype not in layer.cast_bytes:
        stored = (p for _, p in _floating_parameters(module) if p.dtype != dtype)
        layer.cast_bytes[dtype] = sum(p.numel() for p in stored) // layer.ep * dtype.itemsize
    return layer.cast_bytes[dtype]


def _floating_parameters(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The weights as they read: with ep 1, PEFT parametrises them for the length of a forward."""
    found = ((name, getattr(module, name, None)) for name in sorted(KNOWN_PARAMETERS))
    return [(name, p) for name, p in found if isinstance(p, torch.Tensor)]


def _compute_dtype(module: nn.Module, hidden_states: torch.Tensor) -> torch.dtype:
    """autocast's dtype under autocast; else the weights' own, which FSDP2's mixed precision has already cast."""
    if torch.is_autocast_enabled(hidden_states.device.type):
        return torch.get_autocast_dtype(hidden_states.device.type)
    layer: LayerState = module._accel_moe_layer  # pyright: ignore[reportAssignmentType]
    # not _parameters: PEFT's LoRA on experts makes down_proj a property
    return layer.compute_dtype or module.down_proj.dtype  # pyright: ignore[reportReturnType]


@functools.cache
def _eager_forward(cls: type[nn.Module]) -> Callable[..., torch.Tensor]:
    """The family's own loop, behind ours and behind the decorator's dispatch."""
    own = next(
        c
        for c in cls.__mro__
        if "forward" in vars(c) and not issubclass(c, ScatterMoE) and (is_decorated(c) or c.__name__ in SHIMS)
    )
    return inspect.unwrap(own.forward)
