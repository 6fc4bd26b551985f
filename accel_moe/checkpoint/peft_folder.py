"""An adapter's folder, as PEFT saves it: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from accel_moe.checkpoint.dcp_metadata import METADATA_NAME, MODEL_FOLDER
from accel_moe.checkpoint.manifest import TensorEntry
from accel_moe.errors import CheckpointError
from accel_moe.weights.adapter import CONFIG_NAME, WEIGHTS_NAME
from accel_moe.weights.safetensors import HubTensor, Reader, read_headers


class AdapterFile:
    """The tensors of one adapter_model.safetensors: a TensorSource.

    Raises HubFormatError when it is not a safetensors file, or was cut off.
    """

    def __init__(self, path: Path) -> None:
        self._stored: dict[str, HubTensor] = read_headers([str(path)])
        self.tensors = {
            key: TensorEntry(t.shape, str(t.torch_dtype).removeprefix("torch."), ()) for key, t in self._stored.items()
        }

    def check(self) -> list[str]:
        return []

    def missing_files(self) -> list[str]:
        return []

    def size_bytes(self, name: str) -> int:
        return self._stored[name].size_bytes

    def read(self, name: str, memory: torch.Tensor | None = None) -> torch.Tensor:
        with Reader() as reader:
            return reader.tensor(self._stored[name])


def open_adapter_file(folder: Path) -> AdapterFile | None:
    """The adapter of a folder that PEFT wrote; None for another folder, and for a training checkpoint.

    Raises CheckpointError when the folder has an adapter's config and not its weights.
    """
    has_model = any(folder.glob(f"{MODEL_FOLDER}_*")) or (folder / METADATA_NAME).is_file()
    if has_model or not (folder / CONFIG_NAME).is_file():
        return None
    if (folder / WEIGHTS_NAME).is_file():
        return AdapterFile(folder / WEIGHTS_NAME)
    found = sorted(path.name for path in folder.iterdir() if path.name.startswith("adapter_model"))
    raise CheckpointError(
        f"{folder} has {CONFIG_NAME}, and of the adapter's weights {', '.join(found) or 'nothing'}: expected "
        f"{WEIGHTS_NAME}. Load the adapter with PEFT and save it again with save_pretrained."
    )


def read_adapter_config(folder: Path) -> dict[str, Any] | None:
    """The fields of the folder's adapter_config.json; None if it has none. Raises CheckpointError."""
    try:
        fields = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME} cannot be read ({error}). Restore the file.") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{folder / CONFIG_NAME} has {type(fields).__name__}, expected an object. Restore it.")
    return fields
