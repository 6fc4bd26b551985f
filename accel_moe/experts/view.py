"""What a registered experts function sees in place of the module, and the families whose modules are not on the
interface but fit it."""

from __future__ import annotations

import contextlib
import inspect
import types
from dataclasses import dataclass
from typing import Any

from torch import nn

from accel_moe.kernels.hints import NO_HINTS, Hints

LAYOUT_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers' decorator sets on each instance and every experts function reads."""


KNOWN_PARAMETERS = {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}


@dataclass(frozen=True)
class Shim:
    """A family off the interface whose parameters and call fit it: the answers of the decorator that it lacks.

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


class ExpertsView:
    """What a registered experts function sees in place of the module.

    Parameters are the rank's own local tensors, `num_experts` is e, `_is_expert_parallel` says that sentinel
    slots may occur; every other attribute is the module's.

    `hints` are for functions that can use them (ours does). The function is to run within `keeping`.
    """

    keeping: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def __init__(self, module: nn.Module, hints: Hints = NO_HINTS, **answers: Any):
        self._module = module
        self.hints = hints
        self.__dict__.update(answers)

    def with_hints(self, **changes: Any) -> ExpertsView:
        """The same view, with other hints."""
        answers = {name: value for name, value in self.__dict__.items() if name not in ("_module", "hints")}
        return ExpertsView(self._module, self.hints._replace(**changes), **answers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def shim_of(module: nn.Module) -> Shim | None:
    """The shim for a module off the interface, if its class, parameters and call are those that it was written for."""
    if (layer := getattr(module, "_accel_moe_layer", None)) is not None:
        return layer.shim
    shim = SHIMS.get(type(module).__name__)
    if shim is None or is_decorated(type(module)):
        return None
    call = tuple(inspect.signature(type(module).forward).parameters)
    names = tuple(sorted(name for name, p in module._parameters.items() if p is not None))
    fits = call == ("self", "hidden_states", "top_k_index", "top_k_weights") and names == shim.parameters
    return shim if fits else None


def as_interface(module: nn.Module) -> nn.Module | ExpertsView:
    """The module, or for a shimmed one a view of it with the decorator's answers."""
    shim = shim_of(module)
    if shim is None:
        return module
    return ExpertsView(module, **shim_answers(module, shim))


def shim_answers(module: nn.Module, shim: Shim) -> dict[str, Any]:
    """What the decorator would have put on the instance and its class."""
    answers: dict[str, Any] = {**dict(shim.flags), "num_experts": getattr(module, shim.num_experts)}
    if not hasattr(module, "_apply_gate"):
        from transformers.integrations.moe import _default_apply_gate

        answers["_apply_gate"] = types.MethodType(_default_apply_gate, module)
    return answers


def is_decorated(cls: type) -> bool:
    return hasattr(vars(cls).get("forward"), "__wrapped__")
