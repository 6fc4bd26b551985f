"""PEFT's adapters on a model that has no values yet.

PEFT gives an adapter's weights their first values on the CPU, and then moves them to the device of the weight that they
change. For a deferred weight that is meta, where values are lost. Here they stay on the CPU, as values of their own,
which accelerator.prepare keeps and makes the same on every rank (edits.py).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from importlib.util import find_spec

import torch

from accel_moe.patching import install, patch, patches_of
from accel_moe.weights.deferred_tensors import is_deferred

_WHY = (
    "PEFT moves new adapters to the device of the weight they change: to meta, before accelerator.prepare has read a "
    "model of accel_moe.from_pretrained, and their values are lost."
)


@patch("peft.tuners.lora.model.LoraModel._replace_module", why=_WHY, tested="peft 0.21.2")
def replace_module(original, self, parent, child_name, new_module, child):
    if not any(is_deferred(weight) for weight in child.parameters()):
        return original(self, parent, child_name, new_module, child)
    setattr(parent, child_name, new_module)


@patch(
    "peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer",
    "peft.tuners.lora.layer.ParamWrapper._move_adapter_to_device_of_base_layer",
    why=_WHY,
    tested="peft 0.21.2",
)
def move_adapter(original, self, adapter_name, device=None):
    """In place of the move, only the cast to the dtype of the weight."""
    weights = [weight for weight in self.get_base_layer().parameters() if is_deferred(weight)]
    if not weights:
        return original(self, adapter_name, device)
    own = getattr(self.get_base_layer(), getattr(self, "parameter_name", "weight"), weights[0])
    for kind in (*self.adapter_layer_names, *self.other_param_names):
        layers = getattr(self, kind, None)
        if isinstance(layers, torch.nn.ModuleDict) and adapter_name in layers:
            layers[adapter_name].to(own.dtype)


def import_peft() -> None:
    """Import PEFT, if it is there, so that `patch_peft` finds it: a script may import it after from_pretrained."""
    if find_spec("peft") is not None:
        with contextlib.suppress(Exception):  # what is broken there concerns those who use it
            importlib.import_module("peft")


def patch_peft() -> None:
    """Install the patches above where PEFT was imported; its older versions have no ParamWrapper."""
    if hasattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper"):
        install(patches_of(replace_module, move_adapter))
