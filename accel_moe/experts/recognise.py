"""Finds a model's experts modules, chooses their kernel, and refuses what cannot be run, with the reason.

Since v5 every MoE family of transformers calls its experts alike,

    experts(hidden_states[T, H], top_k_index[T, K], top_k_weights[T, K]) -> [T, H]

and its decorator leaves the layout on the instance (`has_gate`, `has_bias`, `is_transposed`,
`is_concatenated`). That seam is all we use: there is no table of architectures here. A module with a flag,
parameter or dtype that is not understood is refused by name; a wrong guess would train without an error.

Nothing here changes a module.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accel_moe.experts.storage import storage_of
from accel_moe.experts.view import KNOWN_PARAMETERS, LAYOUT_FLAGS, ExpertsView, as_interface, shim_of
from accel_moe.kernels import scattermoe

KNOWN_FLAGS = {
    *LAYOUT_FLAGS,
    "has_post_expert_norm",
    "_is_expert_parallel",
    "_is_hf_initialized",
    "_is_full_backward_hook",
}


NORM_KERNELS = ("auto", "eager", "grouped_mm", "batched_mm")
"""The experts functions that apply `post_expert_norm` where a module has it (transformers 5.23)."""


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


class FoundExperts(dict[str, nn.Module]):
    """Experts modules by name; `adapters` are the PEFT wrappers (LoRA `target_parameters`) around them."""

    adapters: list[nn.Module]


def is_experts(module: nn.Module) -> bool:
    """True for an experts module on transformers' experts interface, or with a shim that fits it."""
    if getattr(getattr(module, "_accel_moe_layer", None), "packed", None):
        return True  # its weights are no stacks of matrices any more
    down = module._parameters.get("down_proj")
    if shim_of(module) is not None:
        return True
    flags = all(isinstance(module.__dict__.get(flag), bool) for flag in LAYOUT_FLAGS)
    return flags and down is not None and down.dim() == 3


def find_experts(model: nn.Module) -> FoundExperts:
    """Every experts module of `model` by name, swapped ones included.

    Raises:
        ValueError: the model has none.
    """
    found = FoundExperts({name: module for name, module in model.named_modules() if is_experts(module)})
    found.adapters = [m for m in model.modules() if hasattr(m, "parameter_name") and is_experts(innermost(m))]
    if quantised := sorted({type(m).__name__ for m in model.modules() if _is_quantised_experts(m)}):
        raise ValueError(
            f"accel_moe.prepare() found quantised experts ({', '.join(quantised)}) in {_describe_model(model)}. "
            "Quantised experts are not supported: load the model dequantised, in bf16 or fp32 (MXFP4 and FP8 "
            "checkpoints with their quantization config's dequantize=True). For 4-bit or 8-bit experts, also set "
            "moe_quantize_experts, which quantises dense ones."
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


@dataclass(frozen=True)
class Request:
    """One experts module, and how it is to run.

    Attributes:
        own: the module itself.
        view: the module, or a view of it that answers as the interface's decorator would.
    """

    own: nn.Module
    view: Any
    kernel: str
    ep_degree: int

    @property
    def norm(self) -> bool:
        return bool(getattr(self.view, "has_post_expert_norm", False))


def refusal(module: nn.Module, *, kernel: str, ep_degree: int) -> str | None:
    """Why this experts module cannot be run so, or None. Pure: reads shapes, flags and dtypes only."""
    request = Request(module, as_interface(module), kernel, ep_degree)
    return next(filter(None, (check(request) for check in CHECKS)), None)


def _unknown_flags(request: Request) -> str | None:
    flags = {name for name, value in request.own.__dict__.items() if isinstance(value, bool)}
    flags = {name for name in flags if name.lstrip("_").startswith(("has_", "is_"))}
    if unknown := flags - KNOWN_FLAGS:
        return f"it sets the flag(s) {', '.join(sorted(unknown))}, which accel_moe does not know"
    return None


def _norm(request: Request) -> str | None:
    if not request.norm:
        return None
    norm = getattr(request.view, "post_expert_norm", None)
    if not (_interface_knows_norms() and isinstance(norm, nn.Module)):
        return (
            "it normalises each expert's output (has_post_expert_norm), but has no post_expert_norm module, or this "
            "transformers has no experts function that applies it. Use transformers 5.23 or newer"
        )
    if request.ep_degree > 1:
        return (
            "it normalises each expert's output with a weight that all experts share (has_post_expert_norm), which "
            f"moe_ep_degree={request.ep_degree} would leave with each rank's part of its gradient. Use moe_ep_degree: 1"
        )
    if request.kernel not in NORM_KERNELS:
        return (
            f"it normalises each expert's output (has_post_expert_norm), which moe_kernel={request.kernel} does not. "
            f"Use one of {', '.join(NORM_KERNELS)}"
        )
    return None


def _transformers_own_ep(request: Request) -> str | None:
    if getattr(request.view, "_is_expert_parallel", False):
        return (
            "transformers' own expert parallelism is already on for it. Load the model without "
            "distributed_config / ep_size, and let moe_ep_degree do it"
        )
    return None


def _unknown_parameters(request: Request) -> str | None:
    found = {name for name, _ in request.view.named_parameters()}
    used = set(scattermoe.parameter_names(request.view))
    if unknown := found - (KNOWN_PARAMETERS | ({"post_expert_norm.weight"} if request.norm else set())):
        return f"it has parameter(s) {', '.join(sorted(unknown))}, which accel_moe does not know"
    if missing := used - found:
        return f"its flags say that it has {', '.join(sorted(missing))}, and it has not"
    if surplus := (found & KNOWN_PARAMETERS) - used:
        return f"it has parameter(s) {', '.join(sorted(surplus))}, which its flags say it does not use"
    if buffers := [name for name, _ in request.view.named_buffers()]:
        return f"it has buffer(s) {', '.join(buffers)}, as quantised experts do"
    return None


def _stored_otherwise(request: Request) -> str | None:
    shim, num_experts = shim_of(request.own), request.view.num_experts
    for name, parameter in request.view.named_parameters():
        if storage_of(parameter) is None:
            return f"{name} is stored as {parameter.dtype}; quantised experts are not supported"
        if parameter.shape[0] == num_experts or name not in KNOWN_PARAMETERS:
            continue
        if shim is None or not shim.identity_experts:
            return f"{name} has {parameter.shape[0]} rows on dim 0, where num_experts={num_experts} says otherwise"
        if request.ep_degree > 1:
            return (
                f"{name} has {parameter.shape[0]} rows for {num_experts} experts with weights (the others are identity "
                f"experts), so moe_ep_degree={request.ep_degree} cannot split it like down_proj. Use moe_ep_degree: 1"
            )
    return None


def _ep_degree(request: Request) -> str | None:
    if request.ep_degree > 1 and (why := CALLED_FOR_SOME_BATCHES.get(type(request.own).__name__)):
        return (
            f"{why}, and with moe_ep_degree={request.ep_degree} a rank without any would leave the others waiting for "
            "ever in their exchange. Use moe_ep_degree: 1"
        )
    if (num_experts := request.view.num_experts) % request.ep_degree:
        degrees = ", ".join(str(d) for d in range(1, num_experts + 1) if num_experts % d == 0)
        return (
            f"moe_ep_degree={request.ep_degree} does not divide num_experts={num_experts}. "
            f"Use one of {degrees}, or remove the key to turn expert parallelism off"
        )
    return None


def _kernel(request: Request) -> str | None:
    if request.kernel == "eager" and request.ep_degree > 1:
        return (
            "moe_kernel=eager cannot skip the slots that belong to other ranks, so it does not work with "
            f"moe_ep_degree={request.ep_degree}. Use moe_kernel: auto"
        )
    if request.kernel == "scattermoe" and (why := not_scattermoe(request.own)):
        return f"moe_kernel=scattermoe cannot run it: {why}. Use moe_kernel: auto"
    return None


CHECKS: tuple[Callable[[Request], str | None], ...] = (
    _unknown_flags,
    _norm,
    _transformers_own_ep,
    _unknown_parameters,
    _stored_otherwise,
    _ep_degree,
    _kernel,
)
"""Each says why a request cannot be met, or None; the first reason is the refusal's."""


def _interface_knows_norms() -> bool:
    from transformers.integrations.moe import use_experts_implementation

    return "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters


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
        able = able and not _bf16_interpreted(modules)
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
    if requested == "scattermoe" and _bf16_interpreted(modules):
        raise ValueError(
            "moe_kernel=scattermoe cannot run experts in bfloat16 under TRITON_INTERPRET=1: the interpreter's products "
            "of it are garbage. Load the model in float32 there, or use moe_kernel: auto (grouped_mm here)."
        )
    return requested


def _bf16_interpreted(modules: dict[str, nn.Module]) -> bool:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return interpreted and any(p.dtype == torch.bfloat16 for m in modules.values() for p in m.parameters())


def not_scattermoe(module: nn.Module) -> str | None:
    """Why our kernels cannot run this experts module, or None."""
    why = scattermoe.unsupported_reason(as_interface(module))
    return why and why.replace(ExpertsView.__name__, type(module).__name__)


def triton_can_run() -> bool:
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def innermost(module: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _sounds_like_experts(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "expert" in name or name.endswith("moe") or "moeblock" in name


def _is_quantised_experts(module: nn.Module) -> bool:
    """Experts whose stacked weights are packed, or of less than 16 bits (FP8Experts, Mxfp4GptOssExperts, …)."""
    stacked = (module._parameters.get(name) for name in ("down_proj", "gate_up_proj", "up_proj"))
    packed = any(p is not None and p.dim() >= 3 and storage_of(p) is None for p in stacked)
    scales = any(name.endswith(("_scale_inv", "_scales", "_blocks")) for name in module._parameters)
    return packed or (scales and "expert" in type(module).__name__.lower())


def _describe_model(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (model_type {model_type})" if model_type else type(model).__name__
