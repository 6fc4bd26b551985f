"""The activations between the two projections. To add one, write one file with its two formulas and one line in
`ACTIVATIONS`, there or from outside.

No Triton here: a Triton formula is imported when a kernel is launched.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """act(x), element by element.

    Attributes:
        names: the classes and functions that modules have as `act_fn` (transformers' ACT2FN, torch.nn).
        torch: (x, alpha) -> act(x), in torch: its meaning. Most activations ignore alpha.
        triton: () -> the `triton.jit` function (x, alpha) -> act(x), act'(x), on a tile of fp32.
    """

    names: tuple[str, ...]
    torch: Callable[[Tensor, float], Tensor]
    triton: Callable[[], Any]


def _of_ours(name: str) -> Any:
    return getattr(importlib.import_module("accel_moe.kernels.activation"), name)


def _activation(name: str, names: tuple[str, ...], meaning: Callable[[Tensor, float], Tensor]) -> Activation:
    return Activation(names, meaning, partial(_of_ours, name))


ACTIVATIONS: dict[str, Activation] = {
    "silu": _activation("silu", ("SiLU", "SiLUActivation", "silu"), lambda x, alpha: x * torch.sigmoid(alpha * x)),
    "gelu": _activation("gelu", ("GELUActivation", "gelu"), lambda x, _: F.gelu(x)),
    "gelu_tanh": _activation(
        "gelu_tanh",
        ("GELUTanh", "PytorchGELUTanh", "NewGELUActivation"),
        lambda x, _: F.gelu(x, approximate="tanh"),
    ),
    "relu": _activation("relu", ("ReLU", "relu"), lambda x, _: F.relu(x)),
    "relu2": _activation("relu2", ("ReLUSquaredActivation",), lambda x, _: F.relu(x) ** 2),
}
"""By the kernels' name. A module with any other activation is refused."""


def activation_name(act_fn: Any) -> str | None:
    """The kernels' name for a module's act_fn, or None if they do not know it."""
    name = getattr(act_fn, "__name__", type(act_fn).__name__)
    if name == "GELU":
        return "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
    if name == "GELUActivation" and "python" in getattr(act_fn.act, "__name__", ""):
        return "gelu"
    return next((known for known, activation in ACTIVATIONS.items() if name in activation.names), None)
