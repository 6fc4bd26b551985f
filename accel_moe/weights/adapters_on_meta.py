"""PEFT's adapters on a model whose weights wait in the files: they are made on the CPU, with PEFT's own values.

PEFT makes an adapter's weights on the CPU, initialises them and moves them to the device of the weight that they
change. After `accel_moe.from_pretrained` that device is meta, and the values would be lost. While PEFT works, such a
weight says that it is on the CPU. So the adapter stays there, with the values that the same random numbers give it on a
model that is loaded whole. `accelerator.prepare` gives every rank those of rank 0, shards them with the rest, and reads
the base beside them.

An adapter whose first values are computed from the base's is refused: the base's are not there yet.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from accel_moe.patching import install_fitting, patch, patches_of
from accel_moe.weights.adapter import CHANGES_THE_BASE
from accel_moe.weights.deferred_tensors import seeming_real
from accel_moe.weights.plan import pending

_READS_THE_BASE = (*CHANGES_THE_BASE, "eva")


@patch(
    "peft.tuners.tuners_utils.BaseTuner.inject_adapter",
    why="PEFT moves a new adapter to the base's device, and one that is on meta takes the values with it.",
    tested="peft 0.21.2",
)
def inject_adapter(
    original, self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None
):
    if pending(model) is not None:
        _refuse_what_reads_the_base(self.peft_config[adapter_name])
    with seeming_real():
        return original(self, model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)


@patch(
    "peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer",
    "peft.tuners.lora.layer.ParamWrapper._move_adapter_to_device_of_base_layer",
    why="PEFT calls it again for an adapter that was read from files, with low_cpu_mem_usage.",
    tested="peft 0.21.2",
)
def _move_adapter_to_device_of_base_layer(original, self, adapter_name, device=None):
    with seeming_real():
        return original(self, adapter_name, device)


def _refuse_what_reads_the_base(config: Any) -> None:
    """Raises ValueError for an adapter that begins with values computed from the base's."""
    start = str(getattr(config, "init_lora_weights", None)).lower()
    found = ""
    if start.startswith(_READS_THE_BASE):
        found = f"init_lora_weights: {start}"
    elif getattr(config, "use_dora", False):
        found = "use_dora: True"
    elif getattr(config, "trainable_token_indices", None):
        found = "trainable_token_indices"
    if found:
        raise ValueError(
            f"The adapter has {found}, which is computed from the base's values, and after accel_moe.from_pretrained() "
            "there are none before accelerator.prepare. Load the base with transformers' from_pretrained, and pass the "
            "PEFT model to accel_moe.prepare(model); or use init_lora_weights=True."
        )


def keep_adapters_real() -> None:
    """Install the patches above, where PEFT is installed and has these functions.

    It is imported here: a script may import it after from_pretrained. accelerate imports it anyway, in prepare. An
    adapter on meta, of another version's, is refused by its name then (edits.py).
    """
    if importlib.util.find_spec("peft") is None:
        return
    try:
        importlib.import_module("peft.tuners.lora.layer")
    except Exception:  # it fits nothing that is installed, and makes no adapters
        return
    install_fitting(patches_of(inject_adapter, _move_adapter_to_device_of_base_layer))
