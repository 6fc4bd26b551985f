"""What a registered experts function sees in place of the module, and the families whose modules are not on the
interface but fit it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from accel_moe.kernels.casts import Casts
from accel_moe.kernels.deferred_count import LaterPairs
from accel_moe.kernels.glu import Gate

LAYOUT_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers' decorator sets on each instance and every experts function reads."""


KNOWN_PARAMETERS = {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}


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


class ExpertsView:
    """What a registered experts function sees in place of the module.

    Parameters are the rank's own local tensors, `num_experts` is e, `_is_expert_parallel` says that sentinel
    slots may occur; every other attribute is the module's.

    Six attributes are for functions that can use them (ours does): `weight_grad_scale`, a factor owed to every
    weight gradient; `num_pairs`, the number of slots that are not sentinels, what waits for it, or None; `casts`,
    which makes the parameters in the compute dtype where their own is another, or None; `known_gate`, the gate our
    kernels know it by, so that nobody has to look again at every forward, or None; `rows_ready`, to be called in
    backward as soon as the gradients of the rows and of their weights are there, or None; and `keep_h`, whether the
    up-projection is kept until backward.
    """

    def __init__(self, module: nn.Module, **answers: Any):
        self._module = module
        self.casts: Casts | None = None
        self.known_gate: Gate | None = None
        self.keep_h = True
        self.__dict__.update(answers)

    def of(self, num_pairs: int | LaterPairs, rows_ready: Callable[..., None] | None) -> ExpertsView:
        """The same view of another forward."""
        answers = {name: value for name, value in self.__dict__.items() if name != "_module"}
        return ExpertsView(self._module, **{**answers, "num_pairs": num_pairs, "rows_ready": rows_ready})

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
    """The module, or for a shimmed one a view of it that answers what the decorator would have set."""
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
