"""Which modules are experts, what we can run, what we refuse and why; and the swap.

Since v5 every MoE family of transformers calls its experts alike,

    experts(hidden_states[T, H], top_k_index[T, K], top_k_weights[T, K]) -> [T, H]

and its decorator leaves the layout on the instance (`has_gate`, `has_bias`, `is_transposed`,
`is_concatenated`). That seam is all we use: there is no table of architectures here. A module with a flag,
parameter or dtype that is not understood is refused by name; a wrong guess would train without an error.

The swap gives the module a class of ours, as `fully_shard` does (the two compose): parameters, buffers, names
and shapes stay as they are, no weight is copied. The new forward calls the registered experts function not on
the module but on an `ExpertsView` of it, which answers with local tensors and local counts; FSDP2 must go on
seeing the module's own DTensors.

What the module cannot know before the ranks exist (its dispatcher) is given by shard.py.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from accel_moe.config import MoEConfig, ResolvedConfig
from accel_moe.kernels import scattermoe

if TYPE_CHECKING:
    from accel_moe.dispatch.base import Dispatcher
    from accel_moe.mesh import MeshPlan

LAYOUT_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers' decorator sets on each instance and every experts function reads."""

KNOWN_FLAGS = {
    *LAYOUT_FLAGS,
    "has_post_expert_norm",
    "_is_expert_parallel",
    "_is_hf_initialized",
    "_is_full_backward_hook",
}
KNOWN_PARAMETERS = {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}


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
    dispatcher: Dispatcher | None = None
    tokens_per_expert: torch.Tensor | None = field(default=None, repr=False)
    """[E] int64 on the layer's device: slots routed to each expert since the last `expert_load`."""

    @property
    def ep(self) -> int:
        return self.prepared.config.moe_ep_degree

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.ep


class ExpertsView:
    """What a registered experts function sees in place of the module.

    Parameters are the rank's own local tensors, `num_experts` is e, `_is_expert_parallel` says that sentinel
    slots may occur; every other attribute is the module's.

    Two attributes are for functions that can use them (ours does): `weight_grad_scale`, a factor owed to every
    weight gradient, and `num_pairs`, the number of slots that are not sentinels, or None.
    """

    def __init__(self, module: nn.Module, **answers: Any):
        self._module = module
        self.__dict__.update(answers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class ScatterMoE(nn.Module):
    """The forward that every swapped experts module gets, mixed in before the module's own class."""

    _accel_moe_layer: LayerState

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H], [T, K], [T, K] to [T, H] in the dtype of hidden_states. A collective when ep > 1."""
        layer = self._accel_moe_layer
        _count_tokens(layer, top_k_index)
        dtype = hidden_states.dtype
        compute_dtype = _compute_dtype(self, hidden_states)
        function = experts_function(layer.kernel, self)
        if layer.ep == 1:
            weights = {n: p.to(compute_dtype) for n, p in _floating_parameters(self)}
            view = ExpertsView(self, **weights)
            return function(view, hidden_states.to(compute_dtype), top_k_index, top_k_weights).to(dtype)
        if layer.dispatcher is None:
            raise RuntimeError(
                f"{type(self).__name__} runs with moe_ep_degree={layer.ep} but its experts were never sharded. "
                "Pass the model through accelerator.prepare(model, optimizer) with FSDP2 before its first forward."
            )
        sent = layer.dispatcher.dispatch(hidden_states.to(compute_dtype), top_k_index, top_k_weights)
        view = _local_view(self, layer, sent.num_pairs, compute_dtype)
        rows = function(view, sent.rows, sent.local_index, sent.local_weights)
        return layer.dispatcher.combine(rows.to(compute_dtype), sent).to(dtype)

    def extra_repr(self) -> str:
        layer = self._accel_moe_layer
        own = super().extra_repr()
        text = f"experts={layer.num_experts}, local={layer.num_local_experts}, ep={layer.ep}, kernel={layer.kernel}"
        return f"{own}, {text}" if own else text


def is_experts(module: nn.Module) -> bool:
    """True for an experts module that calls through transformers' experts interface."""
    down = module._parameters.get("down_proj")
    flags = all(isinstance(module.__dict__.get(flag), bool) for flag in LAYOUT_FLAGS)
    return flags and down is not None and down.dim() == 3


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Every experts module of `model` by name, swapped ones included.

    Raises:
        ValueError: the model has none.
    """
    found = {name: module for name, module in model.named_modules() if is_experts(module)}
    if not found:
        lookalikes = sorted({type(m).__name__ for m in model.modules() if _sounds_like_experts(m)})
        hint = (
            f"It has {', '.join(lookalikes)}, which keep(s) its experts in a form of its own, outside the interface."
            if lookalikes
            else "It looks like a dense model; accel_moe is for Mixture-of-Experts models."
        )
        raise ValueError(
            f"accel_moe.prepare() found no experts layer in {_describe_model(model)}. Expected modules on "
            f"transformers' experts interface (@use_experts_implementation). {hint}"
        )
    return found


def refusal(module: nn.Module, *, kernel: str, ep_degree: int) -> str | None:
    """Why this experts module cannot be run so, or None. Pure: reads shapes, flags and dtypes only."""
    flags = {n for n, v in module.__dict__.items() if isinstance(v, bool) and n.lstrip("_").startswith(("has_", "is_"))}
    if unknown := flags - KNOWN_FLAGS:
        return f"it sets the flag(s) {', '.join(sorted(unknown))}, which accel_moe does not know"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises each expert's output before the weighted sum (has_post_expert_norm), not supported yet"
    if getattr(module, "_is_expert_parallel", False):
        return (
            "transformers' own expert parallelism is already on for it. Load the model without "
            "distributed_config / ep_size, and let moe_ep_degree do it"
        )
    parameters = dict(module.named_parameters())
    if unknown := set(parameters) - KNOWN_PARAMETERS:
        return f"it has parameter(s) {', '.join(sorted(unknown))}, which accel_moe does not know"
    if list(module.named_buffers()):
        return f"it has buffer(s) {', '.join(n for n, _ in module.named_buffers())}, as quantised experts do"
    for name, parameter in parameters.items():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            return f"{name} is stored as {parameter.dtype}; quantised experts are not supported"
        if parameter.shape[0] != module.num_experts:
            return (
                f"{name} has {parameter.shape[0]} rows on dim 0, where num_experts={module.num_experts} says otherwise"
            )
    if module.num_experts % ep_degree:
        degrees = ", ".join(str(d) for d in range(1, module.num_experts + 1) if module.num_experts % d == 0)
        return (
            f"moe_ep_degree={ep_degree} does not divide num_experts={module.num_experts}. "
            f"Use one of {degrees}, or remove the key to turn expert parallelism off"
        )
    if kernel == "eager" and ep_degree > 1:
        return (
            "moe_kernel=eager cannot skip the slots that belong to other ranks, so it does not work with "
            f"moe_ep_degree={ep_degree}. Use moe_kernel: auto"
        )
    if kernel == "scattermoe" and (why := scattermoe.unsupported_reason(module)):
        return f"moe_kernel=scattermoe cannot run it: {why}. Use moe_kernel: auto"
    return None


def choose_kernel(requested: str, modules: dict[str, nn.Module]) -> str:
    """Resolve `moe_kernel`.

    `auto` is scattermoe where Triton can run (a CUDA GPU, or Triton's interpreter) and can run these experts, else
    grouped_mm. One kernel for the whole model.

    Raises:
        ValueError: the name is not registered, or scattermoe was asked for where Triton cannot run.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if requested == "auto":
        able = triton_can_run() and all(scattermoe.unsupported_reason(m) is None for m in modules.values())
        return "scattermoe" if able else "grouped_mm"
    known = sorted({"eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()})
    if requested not in known:
        raise ValueError(
            f"moe_kernel={requested!r} is not registered in transformers' experts interface. Use auto or one of "
            f"{', '.join(known)}."
        )
    if requested == "scattermoe" and not triton_can_run():
        raise ValueError(
            "moe_kernel=scattermoe needs a CUDA GPU and Triton, and found neither. Use moe_kernel: auto (grouped_mm "
            "here), or set TRITON_INTERPRET=1 to run the kernels slowly on the CPU for a test."
        )
    return requested


def triton_can_run() -> bool:
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def swap(modules: dict[str, nn.Module], prepared: PreparedState) -> None:
    """Give each module our forward, in place. Nothing else of it changes."""
    for module in modules.values():
        module._accel_moe_layer = LayerState(prepared, module.num_experts, prepared.kernel)
        module.__class__ = _swapped_class(module.__class__)


def swapped_layers(model: nn.Module) -> Iterator[tuple[str, ScatterMoE]]:
    for name, module in model.named_modules():
        if isinstance(module, ScatterMoE):
            yield name, module


def prepared_state(model: nn.Module) -> PreparedState | None:
    """The state `prepare` left on this model, however it was wrapped since (PEFT, compile, checkpointing)."""
    return next((layer._accel_moe_layer.prepared for _, layer in swapped_layers(model)), None)


def expert_load(model: nn.Module) -> dict[str, torch.Tensor]:
    """Slots routed to each expert since the last call, summed over all ranks, then set back to zero.

    A collective when torch.distributed is initialised: every rank calls it at the same point.

    Returns:
        {layer name: [E] int64 on the CPU}. The sum of one layer's row is tokens x K over all ranks and forwards
        (a forward that activation checkpointing runs again is counted once).

    Raises:
        ValueError: the model was not prepared.
    """
    layers = dict(swapped_layers(model))
    if not layers:
        raise ValueError("expert_load() got a model that accel_moe.prepare() has not seen. Call prepare(model) first.")
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
    names = (name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "") for name in layers)
    return dict(zip(names, flat.cpu().split([row.numel() for row in rows])))


def experts_function(kernel: str, module: nn.Module) -> Callable[..., torch.Tensor]:
    if kernel == "eager":
        return _eager_forward(type(module))
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


def _local_view(module: ScatterMoE, layer: LayerState, num_pairs: int, dtype: torch.dtype) -> ExpertsView:
    """The rank's own experts, under the 1/ep gradient scale.

    A rank's expert gradient is a sum over the tokens of its whole ep group, while the loss of each rank is a mean
    over its own tokens and FSDP averages over efsdp alone: without the factor expert gradients are ep times too
    large, and the gradient norm with them.
    """
    scale = 1.0 / layer.ep
    names, local = [], []
    for name, parameter in _floating_parameters(module):
        names.append(name)
        local.append((parameter.to_local() if isinstance(parameter, DTensor) else parameter).to(dtype))
    answers: dict[str, Any] = {"num_pairs": num_pairs, "weight_grad_scale": scale}
    if layer.kernel != "scattermoe":  # it applies the factor in the epilogue of its weight gradient
        local = _ScaleWeightGradients.apply(scale, *local)
    return ExpertsView(
        module, num_experts=layer.num_local_experts, _is_expert_parallel=True, **answers, **dict(zip(names, local))
    )


def _floating_parameters(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, p) for name, p in module._parameters.items() if p is not None]


def _compute_dtype(module: nn.Module, hidden_states: torch.Tensor) -> torch.dtype:
    """autocast's dtype under autocast; else the weights' own, which FSDP2's mixed precision has already cast."""
    if torch.is_autocast_enabled(hidden_states.device.type):
        return torch.get_autocast_dtype(hidden_states.device.type)
    return module.down_proj.dtype


@torch.no_grad()
def _count_tokens(layer: LayerState, top_k_index: torch.Tensor) -> None:
    if torch._C._current_graph_task_id() != -1:
        return  # inside a backward: activation checkpointing is running this forward again
    if torch.compiler.is_compiling():
        return
    size = layer.num_experts + 1  # the last one takes slots without an expert
    index = top_k_index.reshape(-1).long().clamp(max=layer.num_experts)
    counts = torch.zeros(size, dtype=torch.long, device=index.device).scatter_add_(0, index, torch.ones_like(index))
    counts = counts[: layer.num_experts]
    if layer.tokens_per_expert is None:
        layer.tokens_per_expert = counts
    else:
        layer.tokens_per_expert += counts


@functools.cache
def _swapped_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"ScatterMoE{cls.__name__}", (ScatterMoE, cls), {"__module__": cls.__module__})


@functools.cache
def _eager_forward(cls: type[nn.Module]) -> Callable[..., torch.Tensor]:
    """The family's own loop, behind ours and behind the decorator's dispatch."""
    own = next(c for c in cls.__mro__ if "forward" in vars(c) and not issubclass(c, ScatterMoE) and is_decorated(c))
    return inspect.unwrap(own.forward)


def is_decorated(cls: type) -> bool:
    return hasattr(vars(cls).get("forward"), "__wrapped__")


def _sounds_like_experts(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "expert" in name or name.endswith("moe") or "moeblock" in name


def _describe_model(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (model_type {model_type})" if model_type else type(model).__name__


def register_scattermoe() -> None:
    """Register our kernels in transformers' experts interface under the name `scattermoe`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("scattermoe", scattermoe.scattermoe_experts_forward)
