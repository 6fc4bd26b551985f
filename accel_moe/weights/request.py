"""What is asked of from_pretrained: whether weights wait for the shards, and the arguments and folders it refuses.

transformers answers most folders that are no model with "Unrecognized model", and takes an adapter for its base. Here
each is refused by its own name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accel_moe import ranks
from accel_moe.weights.hub_config import first_line

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
EXPECTED = "accel_moe.from_pretrained() expects a model: config.json and *.safetensors."
REFUSED_ARGUMENTS = {
    "gguf_file": "GGUF weights are quantised blocks that no rank can cut into shards",
    "quantization_config": "quantised weights cannot be cut into shards and trained",
    "load_in_4bit": "quantised weights cannot be cut into shards and trained",
    "load_in_8bit": "quantised weights cannot be cut into shards and trained",
    "device_map": "accelerator.prepare decides where each shard lives",
    "state_dict": "there is no file to read the shards from",
    "distributed_config": "transformers would shard the model itself",
    "tp_plan": "transformers would shard the model itself",
    "tp_size": "transformers would shard the model itself",
    "device_mesh": "transformers would shard the model itself",
}
PLAIN_ROAD = (
    "Load it with transformers' own from_pretrained and pass the model to accel_moe.prepare(model), or remove the "
    "argument."
)


def deferred(environ: Mapping[str, str], quantised: bool = False) -> bool:
    """Whether weights wait for accelerator.prepare: in a launch that uses, or may come to use, FSDP2.

    One process without FSDP loads at once, unless the experts are to be `quantised` while they are read; and so do
    DeepSpeed, Megatron and FSDP1, which want the whole model.
    """
    from accelerate.state import AcceleratorState, is_initialized

    if is_initialized():
        state = AcceleratorState()
        plugin = getattr(state, "fsdp_plugin", None)
        if plugin is None:
            return quantised and state.distributed_type.value not in ("DEEPSPEED", "MEGATRON_LM")
        return plugin.fsdp_version == 2
    if environ.get("ACCELERATE_USE_DEEPSPEED", "") == "true" or environ.get("ACCELERATE_USE_MEGATRON_LM", "") == "true":
        return False
    if environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        return environ.get("FSDP_VERSION", "2") == "2"  # the launcher always says; Trainer sets no version here
    return quantised or int(environ.get("WORLD_SIZE", 1)) > 1  # the Accelerator may still be given an FSDP2 plugin


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for a from_pretrained argument that a sharded load cannot honour."""
    for name, why in REFUSED_ARGUMENTS.items():
        if arguments.get(name) not in (None, False):
            raise ValueError(
                f"accel_moe.from_pretrained() cannot load into shards with {name}={arguments[name]!r}: {why}. "
                f"{PLAIN_ROAD}"
            )


def refuse_quantised(name: str, config: Any) -> None:
    """Raises ValueError for a checkpoint whose config says that it is quantised."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method", "?") if isinstance(found, dict) else getattr(found, "quant_method", "?")
    raise ValueError(
        f"{name} is quantised ({getattr(method, 'value', method)}): its weights are packed, and cannot be cut into "
        "shards and trained. Give a dequantised copy of it, or load it with transformers' from_pretrained and its "
        "quantization config's dequantize=True, and pass the model to accel_moe.prepare(model). moe_quantize_experts "
        "(nf4, int8) quantises dense experts while they are read."
    )


def read_config(name: str | os.PathLike, arguments: Mapping[str, Any]) -> Any:
    """The config that from_pretrained will use, or None where only it can tell."""
    from transformers import AutoConfig, PreTrainedConfig

    config = arguments.get("config")
    if isinstance(config, PreTrainedConfig):
        return config
    options = {key: arguments[key] for key in (*HUB_OPTIONS, "trust_remote_code") if key in arguments}
    try:
        return AutoConfig.from_pretrained(config or name, **options)
    except (OSError, ValueError):  # an adapter's folder, or code that must be trusted: from_pretrained says it better
        return None


@contextmanager
def quiet_but_rank_0() -> Iterator[None]:
    """Only rank 0 prints transformers' load report, and no rank leaves loading to rank 0 (accelerate's short cut)."""
    from accelerate.utils import patch_environment
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    if not ranks.is_rank0():
        logging.set_verbosity_error()
    try:
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def named(name: str | os.PathLike) -> Iterator[None]:
    """An OSError within it says which model could not be had: transformers' own does not, without a network."""
    try:
        yield
    except OSError as error:
        if str(name) in str(error) or os.path.isdir(name):
            raise
        raise OSError(
            f"{name} is no folder here, and could not be had from the Hub: {first_line(error)} Give the model's "
            "folder, or a Hub id that you can reach."
        ) from error


def refuse_other_folders(name: str | os.PathLike, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError, or FileNotFoundError, for what is no model. A Hub id is only asked for an adapter's config."""
    _refuse_adapter(name, arguments)
    folder = Path(name, arguments.get("subfolder") or "")
    if folder.is_file():
        raise ValueError(f"{folder} is a file. {EXPECTED} Give its folder, {folder.parent}.")
    if not folder.is_dir():
        if os.path.isabs(name) or str(name).startswith(("./", "../", "~")) or str(name).count("/") > 1:
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

    options = {key: arguments[key] for key in HUB_OPTIONS if key in arguments}
    try:
        found = find_adapter_config_file(str(name), **options)
    except (OSError, ValueError):  # not reachable, or no such repository: from_pretrained says it better
        return
    if found is None:
        return
    try:
        base = json.loads(Path(found).read_text()).get("base_model_name_or_path") or "its base model"
    except (OSError, ValueError, AttributeError):
        base = "its base model"
    raise ValueError(
        f"{name} is a PEFT adapter (it has adapter_config.json) of {base}. {EXPECTED} Load {base} with it, the adapter "
        "with peft.PeftModel.from_pretrained(model, ..., is_trainable=True), and pass that to "
        "accel_moe.prepare(model). To go on without the adapter, give the base, or a model that the adapter was merged "
        "into: python -m accel_moe.consolidate ADAPTER OUT BASE_MODEL."
    )


def _kind(folder: Path, files: list[str]) -> str:
    """The rest of the sentence "<folder> …" that names what it is instead of a model; "" if nothing is known."""
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


def _listed(files: list[str]) -> str:
    return f"{', '.join(files[:4])}{', ...' if files[4:] else ''}" if files else "nothing"
