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

import contextlib
import functools
import inspect
import os
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from accel_moe.config import MoEConfig, ResolvedConfig
from accel_moe.dispatch.chunks import in_chunks
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
NORM_KERNELS = ("auto", "eager", "grouped_mm", "batched_mm")
"""The experts functions that apply `post_expert_norm` where a module has it (transformers 5.23)."""

KNOWN_PARAMETERS = {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}

OFF_INTERFACE = {
    "aria": "its experts take router logits and route inside, before transformers 5.18",
    "dbrx": "its expert weights are flattened into 2-D matrices [experts x ffn, hidden]",
    "doge": "it retrieves rank-1 experts from embedding tables by product keys; there is no expert GEMM",
    "jetmoe": "it routes inside the experts block, and its attention has experts of its own",
    "llama4": "every expert runs on every token in one dense bmm, with the routing score applied to the input",
    "nllb_moe": "its experts are separate fc1/fc2 modules with biases and dropout, one per expert",
    "switch_transformers": "its experts are separate wi/wo modules, one per expert, with a capacity that drops tokens",
    "vitpose_backbone": "its experts are chosen per data set, not routed per token",
}
"""Why a family that has experts is not on the interface. Only words: the refusal itself needs no list."""


CALLED_FOR_SOME_BATCHES = {
    "Ernie4_5_VLMoeMoeExperts": "its vision experts run only for a batch that has images or video",
}
"""Experts that a family's block calls or not, depending on the batch: under ep, ranks that disagree would hang."""


@dataclass(frozen=True)
class Shim:
    """A family off the interface whose parameters and call fit it: what the decorator would have said.

    Attributes:
        num_experts: the attribute with the number of experts that have weights.
        identity_experts: expert numbers from num_experts on pass the token through, times its routing weight.
        parameters: the parameters that the class had in the tested versions; any other set is refused.
        flags: the layout flags.
    """

    num_experts: str = "num_experts"
    identity_experts: bool = False
    parameters: tuple[str, ...] = ("down_proj", "gate_up_proj")
    flags: tuple[tuple[str, bool], ...] = (
        ("has_gate", True),
        ("has_bias", False),
        ("is_transposed", False),
        ("is_concatenated", True),
        ("has_post_expert_norm", False),
        ("_is_expert_parallel", False),
    )


SHIMS = {
    # 5.17, 5.23: the interface's parameters, signature and `_apply_gate` (clamped after the activation), undecorated.
    "Step3p7Experts": Shim(),
    # 5.17, 5.23: the interface's maths for the experts with weights; the others ("zero experts") are the identity.
    "LongcatFlashExperts": Shim(num_experts="num_routed_experts", identity_experts=True),
}
"""Class name to shim. tests/families run each against the family's own loop, in every supported transformers."""


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


@dataclass(frozen=True)
class LowRank:
    """A change of one weight of all experts: scale * left @ right, left [E, a, r] and right [E, r, b], whole."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float


@dataclass
class LayerState:
    """One experts layer's own part of it."""

    prepared: PreparedState
    num_experts: int
    kernel: str
    shim: Shim | None = None
    dispatcher: Dispatcher | None = None
    compute_dtype: torch.dtype | None = None
    """Set where FSDP ignores the layer, and so does not cast its weights."""
    tokens_per_expert: torch.Tensor | None = field(default=None, repr=False)
    """[E] int64 on the layer's device: slots routed to each expert since the last `expert_load`."""
    deltas: dict[str, list[LowRank]] = field(default_factory=dict, repr=False)
    """LoRA on the experts, under ep: by parameter, what its PEFT wrapper lends for the length of a forward."""

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

    def of(self, num_pairs: int) -> ExpertsView:
        """The same view with another `num_pairs`."""
        answers = {name: value for name, value in self.__dict__.items() if name != "_module"}
        return ExpertsView(self._module, **{**answers, "num_pairs": num_pairs})

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
        hidden_states = hidden_states.to(compute_dtype)
        passed = None
        if layer.shim is not None and layer.shim.identity_experts and layer.kernel != "eager":
            top_k_index, top_k_weights, passed = _split_identity(hidden_states, top_k_index, top_k_weights, layer)
        out = self._run(layer, function, hidden_states, top_k_index, top_k_weights)
        return (out if passed is None else out + passed).to(dtype)

    def _run(self, layer: LayerState, function, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        compute_dtype = hidden_states.dtype
        if layer.ep == 1:
            view = _whole_view(self, layer, compute_dtype)
            return function(view, hidden_states, top_k_index, top_k_weights)
        if layer.dispatcher is None:
            raise RuntimeError(
                f"{type(self).__name__} runs with moe_ep_degree={layer.ep} but its experts were never sharded. "
                "Pass the model through accelerator.prepare(model, optimizer) with FSDP2 before its first forward."
            )
        dispatcher = layer.dispatcher
        view = _local_view(self, layer, compute_dtype)  # outside of chunks: they run again when PEFT lends no more
        bytes_per_pair = _bytes_per_pair(view)

        def there_and_back(hidden_states, top_k_index, top_k_weights):
            sent = dispatcher.dispatch(hidden_states, top_k_index, top_k_weights, bytes_per_pair=bytes_per_pair)
            rows = function(view.of(sent.num_pairs), sent.rows, sent.local_index, sent.local_weights)
            return dispatcher.combine(rows.to(compute_dtype), sent)

        if limit := layer.prepared.config.moe_dispatch_chunk_tokens:
            return in_chunks(there_and_back, limit, dispatcher.group, (hidden_states, top_k_index, top_k_weights))
        return there_and_back(hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        layer = self._accel_moe_layer
        own = super().extra_repr()
        text = f"experts={layer.num_experts}, local={layer.num_local_experts}, ep={layer.ep}, kernel={layer.kernel}"
        return f"{own}, {text}" if own else text


class FoundExperts(dict[str, nn.Module]):
    """Experts modules by name; `adapters` are the PEFT wrappers (LoRA `target_parameters`) around them."""

    adapters: list[nn.Module]


class LendsLowRank(nn.Module):
    """Mixed into a PEFT wrapper of an experts parameter when ep > 1.

    PEFT's own forward adds left @ right to the whole weight by parametrisation, which needs a plain tensor where there
    is a shard. Instead the factors are lent to the layer, which adds the part of its own experts. Rank, alpha, scaling
    and active adapters stay PEFT's; so do the names and shapes of lora_A and lora_B, which are dense weights.
    """

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        deltas = self.get_base_layer()._accel_moe_layer.deltas
        active = [self.get_delta_factors(a) for a in active_adapters if a in self.lora_A]
        deltas[self.parameter_name] = [LowRank(*factors) for factors in active]
        try:
            yield
        finally:
            del deltas[self.parameter_name]


def is_experts(module: nn.Module) -> bool:
    """True for an experts module on transformers' experts interface, or with a shim that fits it."""
    down = module._parameters.get("down_proj")
    if shim_of(module) is not None:
        return True
    flags = all(isinstance(module.__dict__.get(flag), bool) for flag in LAYOUT_FLAGS)
    return flags and down is not None and down.dim() == 3


def shim_of(module: nn.Module) -> Shim | None:
    """The shim for a module off the interface, if its class, parameters and call are those that it was written for."""
    if isinstance(module, ScatterMoE):
        return module._accel_moe_layer.shim
    shim = SHIMS.get(type(module).__name__)
    if shim is None or is_decorated(type(module)):
        return None
    call = tuple(inspect.signature(type(module).forward).parameters)
    names = tuple(sorted(name for name, p in module._parameters.items() if p is not None))
    fits = call == ("self", "hidden_states", "top_k_index", "top_k_weights") and names == shim.parameters
    return shim if fits else None


def as_interface(module: nn.Module) -> nn.Module | ExpertsView:
    """The module, or for a shimmed one a view of it that answers what the decorator would have set."""
    shim = shim_of(module)
    if shim is None:
        return module
    return ExpertsView(module, **_shim_answers(module, shim))


def _shim_answers(module: nn.Module, shim: Shim) -> dict[str, Any]:
    """What the decorator would have put on the instance and its class."""
    answers: dict[str, Any] = {**dict(shim.flags), "num_experts": getattr(module, shim.num_experts)}
    if not hasattr(module, "_apply_gate"):
        from transformers.integrations.moe import _default_apply_gate

        answers["_apply_gate"] = types.MethodType(_default_apply_gate, module)
    return answers


def find_experts(model: nn.Module) -> FoundExperts:
    """Every experts module of `model` by name, swapped ones included.

    Raises:
        ValueError: the model has none.
    """
    found = FoundExperts({name: module for name, module in model.named_modules() if is_experts(module)})
    found.adapters = [m for m in model.modules() if hasattr(m, "parameter_name") and is_experts(_innermost(m))]
    if quantised := sorted({type(m).__name__ for m in model.modules() if _is_quantised_experts(m)}):
        raise ValueError(
            f"accel_moe.prepare() found quantised experts ({', '.join(quantised)}) in {_describe_model(model)}. "
            "Quantised experts are not supported: load the model dequantised, in bf16 or fp32 (MXFP4 and FP8 "
            "checkpoints with their quantization config's dequantize=True)."
        )
    if not found:
        classes = {type(m) for m in model.modules() if _sounds_like_experts(m)}
        lookalikes = sorted(cls.__name__ for cls in classes)
        folders = {part for cls in classes for part in cls.__module__.split(".")}
        known = (why for family, why in OFF_INTERFACE.items() if family in folders)
        reason = next(known, "they keep the experts in a form of their own, outside the interface")
        hint = (
            f"It has {', '.join(lookalikes)}, but {reason}."
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
    shim, own = shim_of(module), module
    module = as_interface(module)  # pyright: ignore[reportAssignmentType] a view answers as the module would
    norm = bool(getattr(module, "has_post_expert_norm", False))
    if norm and not (_interface_knows_norms() and isinstance(getattr(module, "post_expert_norm", None), nn.Module)):
        return (
            "it normalises each expert's output (has_post_expert_norm), but has no post_expert_norm module, or this "
            "transformers has no experts function that applies it. Use transformers 5.23 or newer"
        )
    if norm and ep_degree > 1:
        return (
            "it normalises each expert's output with a weight that all experts share (has_post_expert_norm), which "
            f"moe_ep_degree={ep_degree} would leave with each rank's part of its gradient. Use moe_ep_degree: 1"
        )
    if norm and kernel not in NORM_KERNELS:
        return (
            f"it normalises each expert's output (has_post_expert_norm), which moe_kernel={kernel} does not. "
            f"Use one of {', '.join(NORM_KERNELS)}"
        )
    if getattr(module, "_is_expert_parallel", False):
        return (
            "transformers' own expert parallelism is already on for it. Load the model without "
            "distributed_config / ep_size, and let moe_ep_degree do it"
        )
    parameters = dict(module.named_parameters())
    known = KNOWN_PARAMETERS | ({"post_expert_norm.weight"} if norm else set())
    if unknown := set(parameters) - known:
        return f"it has parameter(s) {', '.join(sorted(unknown))}, which accel_moe does not know"
    if missing := _weights_of(module) - set(parameters):
        return f"its flags say that it has {', '.join(sorted(missing))}, and it has not"
    if surplus := (set(parameters) & KNOWN_PARAMETERS) - _weights_of(module):
        return f"it has parameter(s) {', '.join(sorted(surplus))}, which its flags say it does not use"
    if list(module.named_buffers()):
        return f"it has buffer(s) {', '.join(n for n, _ in module.named_buffers())}, as quantised experts do"
    for name, parameter in parameters.items():
        if _is_packed(parameter):
            return f"{name} is stored as {parameter.dtype}; quantised experts are not supported"
        if parameter.shape[0] != module.num_experts and name in KNOWN_PARAMETERS:
            if shim is not None and shim.identity_experts:
                if ep_degree == 1:
                    continue
                return (
                    f"{name} has {parameter.shape[0]} rows for {module.num_experts} experts with weights (the others "
                    f"are identity experts), so moe_ep_degree={ep_degree} cannot split it like down_proj. Use "
                    "moe_ep_degree: 1"
                )
            return (
                f"{name} has {parameter.shape[0]} rows on dim 0, where num_experts={module.num_experts} says otherwise"
            )
    if ep_degree > 1 and (why := CALLED_FOR_SOME_BATCHES.get(type(own).__name__)):
        return (
            f"{why}, and with moe_ep_degree={ep_degree} a rank without any would leave the others waiting for ever in "
            "their exchange. Use moe_ep_degree: 1"
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
    if kernel == "scattermoe" and (why := not_scattermoe(own)):
        return f"moe_kernel=scattermoe cannot run it: {why}. Use moe_kernel: auto"
    return None


def _interface_knows_norms() -> bool:
    from transformers.integrations.moe import use_experts_implementation

    return "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters


def _weights_of(module: nn.Module | ExpertsView) -> set[str]:
    """The parameters that an experts function reads from a module with these flags."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return {up, "down_proj", *([f"{up}_bias", "down_proj_bias"] if module.has_bias else [])}


def limits(module: nn.Module) -> str:
    """How an experts module that runs at ep 1 is limited otherwise, in words; "" if it is not."""
    layout = as_interface(module)
    if getattr(layout, "has_post_expert_norm", False):
        return "moe_ep_degree 1 only: one norm that all experts share"
    if (shim := shim_of(module)) is not None and shim.identity_experts:
        return "moe_ep_degree 1 only: identity experts without weights"
    if why := CALLED_FOR_SOME_BATCHES.get(type(module).__name__):
        return f"moe_ep_degree 1 only: {why}"
    return ""


def choose_kernel(requested: str, modules: dict[str, nn.Module]) -> str:
    """Resolve `moe_kernel`.

    `auto` is scattermoe where Triton can run (a CUDA GPU, or Triton's interpreter) and can run these experts, else
    grouped_mm. One kernel for the whole model.

    Raises:
        ValueError: the name is not registered, or scattermoe was asked for where Triton cannot run.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if requested == "auto":
        able = triton_can_run() and all(not_scattermoe(m) is None for m in modules.values())
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


def not_scattermoe(module: nn.Module) -> str | None:
    """Why our kernels cannot run this experts module, or None."""
    why = scattermoe.unsupported_reason(as_interface(module))
    return why and why.replace(ExpertsView.__name__, type(module).__name__)


def triton_can_run() -> bool:
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


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
        num_experts = as_interface(module).num_experts
        module._accel_moe_layer = LayerState(prepared, num_experts, prepared.kernel, shim_of(module))
        module.__class__ = _swapped_class(module.__class__)


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


def adopt_adapters(found: FoundExperts) -> None:
    """Let the PEFT wrappers around experts work with shards (ep > 1). A second call changes nothing.

    Raises:
        ValueError: one of them cannot be trained over several ranks; none is changed then.
    """
    for adapter in found.adapters:
        _check_adapter(adapter)
    for adapter in found.adapters:
        adapter.__class__ = _lending_class(adapter.__class__)


def _innermost(module: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _check_adapter(adapter: nn.Module) -> None:
    """LoRA's ParamWrapper of peft 0.17 to 0.21, on a 3-D weight; anything else is refused."""
    kind = f"{type(adapter).__name__} on {adapter.parameter_name}"
    if not all(hasattr(adapter, name) for name in ("_activate_lora", "get_delta_factors", "lora_A", "lora_B")):
        raise ValueError(f"moe_ep_degree > 1 with {kind} is not supported. Use LoRA (LoraConfig.target_parameters).")
    if adapter.get_param().dim() != 3:
        raise ValueError(
            f"moe_ep_degree > 1 with LoRA on {adapter.parameter_name}, which is not a stack of matrices, is not "
            "supported. Leave it out of target_parameters."
        )


@functools.cache
def _lending_class(cls: type[nn.Module]) -> type[nn.Module]:
    return (
        cls
        if issubclass(cls, LendsLowRank)
        else type(cls.__name__, (LendsLowRank, cls), {"__module__": cls.__module__})
    )


def swapped_layers(model: nn.Module) -> Iterator[tuple[str, ScatterMoE]]:
    for name, module in model.named_modules():
        if isinstance(module, ScatterMoE):
            yield name, module


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
    return dict(zip(map(plain_name, layers), flat.cpu().split([row.numel() for row in rows])))


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
    identity = top_k_index >= layer.num_experts
    passed = (top_k_weights * identity).sum(-1, keepdim=True)
    top_k_index = top_k_index.clamp(max=layer.num_experts)
    return top_k_index, top_k_weights.masked_fill(identity, 0.0), (hidden_states * passed).to(hidden_states.dtype)


def _whole_view(module: ScatterMoE, layer: LayerState, dtype: torch.dtype) -> ExpertsView:
    answers: dict[str, Any] = {name: p.to(dtype) for name, p in _floating_parameters(module)}
    if layer.shim is not None:
        answers.update(_shim_answers(module, layer.shim))
        if layer.shim.identity_experts and layer.kernel != "eager":
            answers["gate_up_proj"] = answers["gate_up_proj"][: layer.num_experts]
            answers["_is_expert_parallel"] = True  # identity slots are sentinels now, which grouped_mm must skip
    return ExpertsView(module, **answers)


def _local_view(module: ScatterMoE, layer: LayerState, dtype: torch.dtype) -> ExpertsView:
    """The rank's own experts, under the 1/ep gradient scale.

    A rank's expert gradient is a sum over the tokens of its whole ep group, while the loss of each rank is a mean
    over its own tokens and FSDP averages over efsdp alone: without the factor expert gradients are ep times too
    large, and the gradient norm with them.
    """
    scale = 1.0 / layer.ep
    weights = dict(_floating_parameters(module))
    local = {n: (p.to_local() if isinstance(p, DTensor) else p).to(dtype) for n, p in weights.items()}
    answers: dict[str, Any] = _shim_answers(module, layer.shim) if layer.shim is not None else {}
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
    return ExpertsView(module, **answers, **local)


def _bytes_per_pair(view: ExpertsView) -> int:
    """What one (row, expert) pair takes at least in forward: the pre-activation and the activation, [2I] and [I]."""
    weights = (getattr(view, name, None) for name in ("gate_up_proj", "up_proj", "down_proj"))
    per_expert = sum(w.numel() * w.element_size() for w in weights if w is not None) // view.num_experts
    hidden = view.down_proj.shape[-1 if view.is_transposed else -2]
    return per_expert // hidden


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
    own = next(
        c
        for c in cls.__mro__
        if "forward" in vars(c) and not issubclass(c, ScatterMoE) and (is_decorated(c) or c.__name__ in SHIMS)
    )
    return inspect.unwrap(own.forward)


def is_decorated(cls: type) -> bool:
    return hasattr(vars(cls).get("forward"), "__wrapped__")


def _sounds_like_experts(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "expert" in name or name.endswith("moe") or "moeblock" in name


def _is_quantised_experts(module: nn.Module) -> bool:
    """Experts whose stacked weights are packed, or of less than 16 bits (FP8Experts, Mxfp4GptOssExperts, …)."""
    stacked = (module._parameters.get(name) for name in ("down_proj", "gate_up_proj", "up_proj"))
    packed = any(p is not None and p.dim() >= 3 and _is_packed(p) for p in stacked)
    scales = any(name.endswith(("_scale_inv", "_scales", "_blocks")) for name in module._parameters)
    return packed or (scales and "expert" in type(module).__name__.lower())


def _is_packed(parameter: torch.Tensor) -> bool:
    return not parameter.is_floating_point() or parameter.element_size() < 2


def _describe_model(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (model_type {model_type})" if model_type else type(model).__name__


def register_scattermoe() -> None:
    """Register our kernels in transformers' experts interface under the name `scattermoe`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("scattermoe", scattermoe.scattermoe_experts_forward)
