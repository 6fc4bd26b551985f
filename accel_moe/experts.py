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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from accel_moe import whereabouts
from accel_moe.adapters import LowRank, adopt_adapters
from accel_moe.config import MoEConfig, ResolvedConfig
from accel_moe.dispatch.chunks import in_chunks
from accel_moe.dispatch.keep import runs_again
from accel_moe.kernels import scattermoe
from accel_moe.kernels.casts import Casts
from accel_moe.kernels.counts import LaterPairs
from accel_moe.kernels.gate import Gate, gate_of
from accel_moe.recognise import (
    KNOWN_PARAMETERS,
    SHIMS,
    ExpertsView,
    FoundExperts,
    Shim,
    as_interface,
    is_decorated,
    shim_answers,
    shim_of,
)

if TYPE_CHECKING:
    from accel_moe.dispatch.base import Dispatcher
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


@dataclass
class LayerState:
    """One experts layer's own part of it."""

    prepared: PreparedState
    num_experts: int
    kernel: str
    shim: Shim | None = None
    gate: Gate | None = None
    """Where our kernels know it."""
    dispatcher: Dispatcher | None = None
    compute_dtype: torch.dtype | None = None
    """Set where FSDP ignores the layer, and so does not cast its weights."""
    tokens_per_expert: torch.Tensor | None = field(default=None, repr=False)
    """[E] int64 on the layer's device: slots routed to each expert since the last `expert_load`."""
    pair_widths: tuple[int, int] | None = None
    """Values that a (row, expert) pair takes without and with a backward to come; read off the weights once."""
    cast_bytes: dict[torch.dtype, int] = field(default_factory=dict, repr=False)
    """What this rank's experts take in a dtype, where they are stored in another; read off them once."""
    deltas: dict[str, list[LowRank]] = field(default_factory=dict, repr=False)
    """LoRA on the experts, under ep: by parameter, what its PEFT wrapper lends for the length of a forward."""

    @property
    def ep(self) -> int:
        return self.prepared.config.moe_ep_degree

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.ep

    @property
    def keep_h(self) -> bool:
        return not self.prepared.config.moe_recompute_up_projection


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
            _count_tokens(layer, routed)
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
                _count_tokens(layer, routed)

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


def swapped_layers(model: nn.Module) -> Iterator[tuple[str, ScatterMoE]]:
    """By the names that a state dict gives them, whatever wraps them."""
    for name, module in model.named_modules():
        if isinstance(module, ScatterMoE):
            yield plain_name(name), module


def holds_experts(module: nn.Module) -> bool:
    """Whether it is a swapped layer, or has one in it."""
    return any(True for _ in swapped_layers(module))


def prepared_state(model: nn.Module) -> PreparedState | None:
    """The state `prepare` left on this model, however it was wrapped since (PEFT, compile, checkpointing)."""
    return next((layer._accel_moe_layer.prepared for _, layer in swapped_layers(model)), None)


WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")


def plain_name(name: str) -> str:
    """A module's or parameter's name without what activation checkpointing, torch.compile and FSDP1 wrap into it."""
    for segment in WRAPPER_SEGMENTS:
        name = name.replace(segment, "")
    return name


def expert_load(model: nn.Module) -> dict[str, torch.Tensor]:
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
        raise ValueError("expert_load() got a model that accel_moe.prepare() has not seen. Call prepare(model) first.")
    whereabouts.meet("accel_moe.expert_load")
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


@torch.no_grad()
def _count_tokens(layer: LayerState, top_k_index: torch.Tensor) -> None:
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


@functools.cache
def _swapped_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"ScatterMoE{cls.__name__}", (ScatterMoE, cls), {"__module__": cls.__module__})


@functools.cache
def _eager_forward(cls: type[nn.Module]) -> Callable[..., torch.Tensor]:
    """The family's own loop, behind ours and behind the decorator's dispatch."""
    own = next(
        c
        for c in cls.__mro__
        if "forward" in vars(c) and not issubclass(c, ScatterMoE) and (is_decorated(c) or c.__name__ in SHIMS)
    )
    return inspect.unwrap(own.forward)


def register_scattermoe() -> None:
    """Register our kernels in transformers' experts interface under the name `scattermoe`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("scattermoe", scattermoe.scattermoe_experts_forward)
