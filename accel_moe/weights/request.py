"""What a folder that was given to `accel_moe.from_pretrained` holds, where it is no model: said by its own name.

transformers answers most of these with "Unrecognized model", and takes an adapter for its base.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXPECTED = "accel_moe.from_pretrained() expects a model: config.json and *.safetensors."


def refuse_other_folders(name: str | os.PathLike, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError, or FileNotFoundError, for what is no model. A Hub id is only asked for an adapter's config."""
    _refuse_adapter(name, arguments)
    folder = Path(name, arguments.get("subfolder") or "")
    if folder.is_file():
        raise ValueError(f"{folder} is a file. {EXPECTED} Give its folder, {folder.parent}.")
    if not folder.is_dir():
        if os.path.isabs(name) or str(name).startswith(("./", "../", "~")):
            raise FileNotFoundError(f"{folder} does not exist. {EXPECTED}")
        return
    files = sorted(entry.name for entry in folder.iterdir())
    configured = "config.json" in files or arguments.get("config") is not None
    if configured and any(file.endswith((".safetensors", ".safetensors.index.json")) for file in files):
        return
    if why := _kind(folder, files):
        raise ValueError(f"{folder} {why}")
    if not configured:
        raise ValueError(f"{folder} has no config.json; it holds {_listed(files)}. {EXPECTED}")


def _refuse_adapter(name: str | os.PathLike, arguments: Mapping[str, Any]) -> None:
    from transformers.utils import find_adapter_config_file

    options = ("cache_dir", "force_download", "token", "revision", "local_files_only", "subfolder")
    try:
        found = find_adapter_config_file(str(name), **{key: arguments[key] for key in options if key in arguments})
    except (OSError, ValueError):  # not reachable, or no such repository: from_pretrained says it better
        return
    if found is None:
        return
    try:
        base = json.loads(Path(found).read_text()).get("base_model_name_or_path") or "its base model"
    except (OSError, ValueError, AttributeError):
        base = "its base model"
    raise ValueError(
        f"{name} is a PEFT adapter (it has adapter_config.json) of {base}. {EXPECTED} Load {base} with transformers' "
        "from_pretrained, the adapter with peft.PeftModel.from_pretrained(model, ..., is_trainable=True), and pass "
        "that to accel_moe.prepare(model). To go on without the adapter, give the base, or a folder that "
        "merge_and_unload() was saved to."
    )


def _kind(folder: Path, files: list[str]) -> str:
    """In words, what it is instead; "" where nothing is known."""
    if any((folder / part / ".metadata").is_file() for part in ("", *files)):
        return (
            f"is a sharded training checkpoint (torch.distributed.checkpoint). {EXPECTED} Go on training from it: load "
            "the base model, and call accelerator.load_state(...) after accelerator.prepare, or give Trainer "
            "resume_from_checkpoint=...; or make a model of it first: python -m accel_moe.consolidate CHECKPOINT OUT "
            "BASE_MODEL."
        )
    if any(re.fullmatch(r"pytorch_model_fsdp.*\.bin", file) for file in files):
        return (
            f"is a training checkpoint of accelerate (pytorch_model_fsdp.bin). {EXPECTED} Load the base model, and "
            "call accelerator.load_state(...) after accelerator.prepare."
        )
    checkpoints = sorted((f for f in files if re.fullmatch(r"checkpoint[-_]\d+", f)), key=lambda f: int(f[11:]))
    models = [
        f for f in checkpoints if (folder / f / "config.json").is_file() and [*(folder / f).glob("*.safetensors")]
    ]
    if models:
        return f"is the folder of a run. {EXPECTED} Give the model in it that you mean: {_listed(models[::-1])}."
    if checkpoints or (folder / "checkpoints").is_dir():
        return (
            f"is the folder of a run, with {_listed(checkpoints or ['checkpoints'])} in it. {EXPECTED} Give the model "
            "that the run began with, and resume (resume_from_checkpoint=..., accelerator.load_state(...)); or make a "
            "model of one of its checkpoints: python -m accel_moe.consolidate CHECKPOINT OUT BASE_MODEL."
        )
    if gguf := [file for file in files if file.endswith(".gguf")]:
        return (
            f"holds GGUF weights ({_listed(gguf)}), quantised blocks that no rank can cut into shards. {EXPECTED} Give "
            "the original model; or load it with transformers' from_pretrained(..., gguf_file=...), which dequantises "
            "it, and save_pretrained() it once."
        )
    if pickled := [file for file in files if re.fullmatch(r"pytorch_model.*\.bin|.*\.pth?", file)]:
        return (
            f"has {_listed(pickled)}; accel_moe.from_pretrained() reads safetensors only, the one format that can be "
            "read in parts. Load it with transformers' from_pretrained and save_pretrained() it once, or pass that "
            "model to accel_moe.prepare(model)."
        )
    if "config.json" in files:
        return f"has a config.json and no weights; it holds {_listed(files)}. {EXPECTED}"
    return ""


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _listed(files: list[str]) -> str:
    return f"{', '.join(files[:4])}{', ...' if files[4:] else ''}" if files else "nothing"
