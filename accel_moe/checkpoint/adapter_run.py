"""Checkpoints of a PEFT run: they hold what the run made, and of the base only a description.

A PEFT model's state dict has the whole base in it, frozen. A checkpoint takes from it the adapters, everything else
that trains, and the buffers outside of the experts. The optimizer has states of what trains alone. The manifest gets
the adapter's config and the digests of the base's tensors (weights/fingerprint.py): a resumed run must have read the
same base.

Checkpoints that hold the base, as this package and accelerate wrote them before, load as they did.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accel_moe import ranks
from accel_moe.checkpoint.dcp_metadata import MODEL_PREFIX
from accel_moe.checkpoint.manifest import AdapterEntry, Manifest
from accel_moe.errors import CheckpointError, first_few
from accel_moe.experts.state import prepared_state, swapped_layers
from accel_moe.names import plain_name
from accel_moe.weights.adapter import plain_names
from accel_moe.weights.base_model import BaseModel, local_base
from accel_moe.weights.fingerprint import digests, first_difference, other_base

_known: dict[tuple[str, ...], dict[str, str]] = {}
"""Digests that this process computed, by the stamps of the base's files."""


def adapters_of(model: Any) -> dict[str, Any]:
    """PEFT's configs of a model by adapter, however the model was wrapped since; empty without PEFT."""
    for wrapped in (model, getattr(model, "_orig_mod", None)):
        configs = getattr(wrapped, "peft_config", None)
        if isinstance(configs, dict):
            return configs
    return {}


def without_base(model: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model's state dict that its base's files do not have; all of it without PEFT."""
    kept = _kept_names(model)
    return {name: value for name, value in state_dict.items() if kept is None or plain_name(name) in kept}


def _kept_names(model: Any) -> set[str] | None:
    """Names of the adapters, of what trains, and of the buffers outside of experts. None: the whole model is kept."""
    adapters = adapters_of(model)
    if not adapters:
        return None
    experts = tuple(f"{name}." for name, _ in swapped_layers(model))
    parameters = ((plain_name(name), p) for name, p in model.named_parameters(remove_duplicate=False))
    kept = {name for name, p in parameters if p.requires_grad or not set(adapters).isdisjoint(name.split("."))}
    buffers = (plain_name(name) for name, _ in model.named_buffers(remove_duplicate=False))
    return kept | {name for name in buffers if not name.startswith(experts)}


def names_in(model: Any, names: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """Name in a checkpoint → the model's name, for the tensors that both have. `stored` are DCP's names.

    accelerate saves an adapter alone under PEFT's own names, which lack the adapter's ("lora_A.weight").
    """
    own = {plain_name(name): name for name in names}
    there = {name.removeprefix(MODEL_PREFIX): plain_name(name.removeprefix(MODEL_PREFIX)) for name in stored}
    plain: dict[str, str] = {}
    if adapters_of(model) and any(".lora_" in name and name not in own for name in there.values()):
        plain = {name: own[live] for name, live in plain_names(own, _active_adapter(model)).items()}
    known = plain | own
    return {name: known[bare] for name, bare in there.items() if bare in known}


def check_adapter(folder: Path, stored: Mapping[str, Any], model: Any) -> None:
    """Raises CheckpointError when a checkpoint's adapter, or anything else that was trained, is not the model's."""
    ours = {plain_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    live = names_in(model, ours, stored)
    theirs = {live.get(name, name): entry.shape for name, entry in _without_prefix(stored).items()}
    alone = not set(live.values()) <= set(live)  # PEFT's own names: of the active adapter, without other weights
    needed = [name for name in _kept_names(model) or () if name in ours and not (alone and ".lora_" not in name)]
    wrong = [
        f"{name} has shape {theirs[name]} there, {ours[name]} here"
        for name in ours
        if name in theirs and theirs[name] != ours[name]
    ]
    wrong += [f"{name} is not in it" for name in sorted(needed) if name not in theirs]
    wrong += [f"{name} is only there" for name in theirs if name not in ours]
    if wrong:
        raise CheckpointError(
            f"{folder} is a checkpoint of another adapter: {first_few(wrong)}. Nothing was loaded. Build the model and "
            "its adapter as they were trained there, or give another folder."
        )


def _without_prefix(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(MODEL_PREFIX): entry for name, entry in stored.items()}


def _active_adapter(model: Any) -> str:
    active = getattr(model, "active_adapter", None)
    configs = adapters_of(model)
    return active if isinstance(active, str) and active in configs else next(iter(configs))


# --- the base


def describe_adapter(models: Iterable[Any]) -> AdapterEntry | None:
    """The manifest's entry for the first model with an adapter. A collective: the ranks share the reading."""
    for model in models:
        if configs := adapters_of(model):
            name = _active_adapter(model)
            config = _plain(configs[name].to_dict())
            base, found = _base_of(model)
            config["base_model_name_or_path"] = config.get("base_model_name_or_path") or base
            return AdapterEntry(name, config, found)
    return None


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """A config as JSON reads it back: sets become sorted lists, and what JSON lacks becomes text."""
    return json.loads(json.dumps(fields, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))


def _base_of(model: Any) -> tuple[str | None, dict[str, str]]:
    """The base's name, and its tensors' digests if all ranks find its files. A collective."""
    state = prepared_state(model)
    name = getattr(state, "base_model", None)
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    base = local_base(name, revision) if name else None
    found = ranks.gather(None if base is None else tuple(base.stamps()))
    if base is None or any(stamps is None for stamps in found):
        return name, {}
    return name, _digests_everywhere(base)


def _digests_everywhere(base: BaseModel) -> dict[str, str]:
    """A collective. Files that did not change are not read again."""
    stamps = (str(base.folder), *base.stamps())
    if not all(ranks.gather(stamps in _known)):
        parts: list[dict[str, str]] = []

        def read() -> None:
            parts.append(digests(base, sorted(base.tensors)[ranks.rank() :: ranks.world_size()]))

        ranks.run_or_raise_everywhere(f"reading {base.folder}", read)
        _known[stamps] = {key: digest for part in ranks.gather(parts[0]) for key, digest in part.items()}
    return _known[stamps]


def check_base(folder: Path, manifest: Manifest | None, models: Iterable[Any]) -> None:
    """Raises CheckpointError on every rank when the run has read another base than the checkpoint's. A collective."""
    if manifest is None or manifest.adapter is None or not manifest.adapter.base_tensors:
        return
    model = next((model for model in models if adapters_of(model)), None)
    if model is None:
        return  # the names do not fit, which is told by name
    name, found = _base_of(model)
    if not found:
        if ranks.is_rank0():
            warnings.warn(
                f"{folder} does not hold the base ({manifest.base_model}), and this run's base is not among the local "
                "files: nothing says that the two are the same.",
                stacklevel=3,
            )
    elif line := first_difference(manifest.adapter.base_tensors, found):
        raise CheckpointError(other_base(folder, name, line))
