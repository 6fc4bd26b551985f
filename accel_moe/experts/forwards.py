"""Whose forward an experts layer runs: ours, or somebody put another in its place, and it would run instead.

Liger Kernel's patches replace the forward of experts beside those of norms, rotary embeddings and the loss: on the
instance (`TrainingArguments(use_liger_kernel=True)`, when train() begins), or the whole class, before the model is
made. There the experts become ours again, whichever patch came first, and the rest stays Liger's. Any other forward is
an error by the layer's name. Under expert parallelism it would compute with a rank's part of the experts.

Looked at in accel_moe.prepare, in accelerator.prepare, and once more before a layer's first forward.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from accel_moe import ranks
from accel_moe.experts.identity import WithIdentityExperts
from accel_moe.experts.layer import ScatterMoE
from accel_moe.experts.recognise import innermost, is_experts
from accel_moe.experts.state import swapped_layers
from accel_moe.experts.view import Shim
from accel_moe.names import plain_name

logger = logging.getLogger("accel_moe")

LIGER = "liger_kernel."
OURS = (ScatterMoE, WithIdentityExperts)


def adopt_liger_experts(model: nn.Module) -> None:
    """Experts that Liger's class took the place of, when the model was made, go on transformers' experts interface.

    Its class has the interface's parameters, layout and call, with SiLU; what is missing are the decorator's flags.
    """
    for module in model.modules():
        cls = type(module)
        if cls.__module__.startswith(LIGER) and cls.__name__ == "LigerExperts" and _fits(module):
            module.__dict__.update(dict(Shim().flags), act_fn=nn.functional.silu)
            module.__class__ = _decorated(cls)


def _fits(module: nn.Module) -> bool:
    call = tuple(inspect.signature(type(module).forward).parameters)
    return call == ("self", "hidden_states", "top_k_index", "top_k_weights") and (
        tuple(sorted(module._parameters)) == Shim().parameters
    )


@functools.cache
def _decorated(cls: type[nn.Module]) -> type[nn.Module]:
    from transformers.integrations.moe import use_experts_implementation

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return cls.forward(self, hidden_states, top_k_index, top_k_weights)

    return use_experts_implementation(type(cls.__name__, (cls,), {"__module__": cls.__module__, "forward": forward}))


def take_back(model: nn.Module, prefix: str = "") -> None:
    """Remove Liger's forwards from the experts of `model`, and from PEFT's wrappers around them. Not a collective.

    Args:
        prefix: the name of `model` itself, for the error.

    Raises:
        ValueError: the forward of an experts layer, or of its class, is somebody else's.
    """
    given_up = 0
    for name, module in _experts_and_wrappers(model):
        bound = module.__dict__.get("forward")
        if bound is not None and _is_ligers(bound):
            given_up += 1
            for attribute in ("forward", "_get_name"):
                if _is_ligers(module.__dict__.get(attribute)):
                    del module.__dict__[attribute]
        elif bound is not None:
            _refuse(f"{prefix}{name}", module, bound, "on the module itself")
        for cls, function in _foreign_in_classes(module):
            _refuse(f"{prefix}{name}", module, function, f"in the class {cls.__name__}")
    if given_up and ranks.is_rank0():
        logger.info("Liger's forward of %d experts layers gave way to ours; its other kernels stay", given_up)


def _experts_and_wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, ScatterMoE) or is_experts(innermost(module)):
            yield plain_name(name), module


def _is_ligers(function: Any) -> bool:
    """_get_name, too, which Liger binds to a lambda."""
    function = getattr(function, "__func__", function)
    return str(getattr(function, "__module__", "")).startswith(LIGER)


def _foreign_in_classes(module: nn.Module) -> Iterator[tuple[type, Callable[..., Any]]]:
    """Forwards that do not come from where their class does, or from transformers' decorator, or from us."""
    for cls in type(module).__mro__:
        function = vars(cls).get("forward")
        if function is None or cls in OURS:
            continue
        if issubclass(cls, ScatterMoE) or not _is_expected(function, cls):
            yield cls, function
        if not issubclass(cls, ScatterMoE):
            return  # what this class has overridden does not run


def _is_expected(function: Callable[..., Any], cls: type) -> bool:
    from transformers.integrations.moe import use_experts_implementation

    code = getattr(function, "__code__", None)
    if code is None:
        return False
    homes = {use_experts_implementation.__code__.co_filename, __file__}
    try:
        homes.add(inspect.getfile(cls))
    except (OSError, TypeError):  # a class that was made at run time
        return True
    return code.co_filename in homes


def _refuse(name: str, module: nn.Module, function: Any, where: str) -> None:
    function = getattr(function, "func", getattr(function, "__func__", function))
    whose = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
    raise ValueError(
        f"{name} ({type(module).__name__}) does not run its own forward: {whose} was put in its place, {where}. "
        "accel_moe runs these experts as ScatterMoE layers, and under expert parallelism a rank has only its part of "
        "them. Leave the experts out of that patch, or do not pass the model to accel_moe.prepare()."
    )


class FirstForward:
    """A hook on the module that holds an experts layer: it looks once, before the first forward, and takes itself off.

    torch.compile does not see it: a compiled model was looked at in accelerator.prepare.
    """

    def __init__(self, name: str):
        self._name = name

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is self]:
            del module._forward_pre_hooks[key]
        take_back(module, f"{self._name}." if self._name else "")


def watch_first_forwards(model: nn.Module) -> None:
    """Look again before each swapped layer runs for the first time."""
    parents = {name.rpartition(".")[0] for name, _ in swapped_layers(model)}
    for name in sorted(parents):
        model.get_submodule(name).register_forward_pre_hook(FirstForward(name))
