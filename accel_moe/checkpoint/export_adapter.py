"""The adapter of a training checkpoint in PEFT's own form: adapter_config.json and adapter_model.safetensors.

One process, no base; memory is that of the largest tensor. The folder appears whole, like any export.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from accel_moe.checkpoint.durable import fsync
from accel_moe.checkpoint.export_out import appear, place_of
from accel_moe.checkpoint.export_write import journal
from accel_moe.checkpoint.merged import adapter_fields, plain_names_of
from accel_moe.checkpoint.opened import Checkpoint
from accel_moe.checkpoint.tensor_reader import TensorReader
from accel_moe.errors import CheckpointError
from accel_moe.weights.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME, is_adapter
from accel_moe.weights.safetensors import DTYPE_NAMES, HubTensor, header_bytes


def export_adapter(checkpoint: Checkpoint, out: Path) -> tuple[int, int]:
    """Writes the adapter to OUT; returns the number of its tensors and bytes.

    Raises CheckpointError when the checkpoint is of no adapter run, or is PEFT's folder already.
    """
    reader = checkpoint.reader
    if not isinstance(reader, TensorReader):
        raise CheckpointError(f"{checkpoint.name} is an adapter in PEFT's form already. Use it as it is.")
    if not is_adapter(reader.tensors):
        found = next(iter(reader.tensors))
        raise CheckpointError(
            f"{checkpoint.name} holds no adapter: expected tensors such as *.lora_A.*, found {found} and others. Leave "
            "--adapter out, and give the base."
        )
    fields = adapter_fields(checkpoint) | {"inference_mode": True}
    names = {
        key: stored for key, stored in plain_names_of(checkpoint).items() if _is_of_adapter(checkpoint, key, stored)
    }
    tensors = [
        HubTensor(_with_prefix(key), DTYPE_NAMES[getattr(torch, entry.dtype)], entry.shape, WEIGHTS_NAME)
        for key, entry in ((key, reader.tensors[stored]) for key, stored in names.items())
    ]
    place = place_of(out)
    place.staging.mkdir(parents=True, exist_ok=True)
    with journal(place, f"adapter {checkpoint.name}"):
        header, offsets = header_bytes(tensors)
        with open(place.staging / WEIGHTS_NAME, "wb") as stream:
            stream.write(header)
            for key, stored in names.items():
                value = reader.read(stored).contiguous()
                stream.seek(offsets[_with_prefix(key)])
                stream.write(memoryview(value.view(-1).view(torch.uint8).numpy()))
            stream.flush()
            fsync(stream.fileno())
        (place.staging / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        appear(place)
    return len(tensors), os.path.getsize(place.final / WEIGHTS_NAME)


def _is_of_adapter(checkpoint: Checkpoint, key: str, stored: str) -> bool:
    """Whether PEFT's folder has it: everything where the base was left out, else the adapter's own tensors."""
    alone = checkpoint.manifest is not None and checkpoint.manifest.adapter is not None
    return alone or ".lora_" in key or ".modules_to_save." in stored


def _with_prefix(key: str) -> str:
    return key if key.startswith(PREFIX) else PREFIX + key
