"""The load plan of a model on meta: made from the files' headers, kept on the model, checked before it is filled."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from accel_moe import ranks
from accel_moe.errors import first_few
from accel_moe.names import plain_name
from accel_moe.patching import TRANSFORMERS, patch
from accel_moe.weights import deferred_tensors, edits
from accel_moe.weights.deferred_tensors import Origin, defer, watch
from accel_moe.weights.load_groups import LoadGroup, load_groups
from accel_moe.weights.request import PLAIN_ROAD, refuse_quantised
from accel_moe.weights.safetensors import STAGING_BYTES, HubTensor, Reader, read_headers
from accel_moe.weights.transforms import dry_load

logger = logging.getLogger("accel_moe")


@dataclass(frozen=True)
class LoadPlan:
    """The files' tensors, and the parameters of a model that they become.

    Attributes:
        name: as given to from_pretrained.
        groups: the tensors to read, with the parameters or buffers that they become.
        dtypes: parameter or buffer → the dtype that from_pretrained gives it.
        missing: parameters that the checkpoint lacks; initialised, real.
        files: path → bytes, when the headers were read.
    """

    name: str
    groups: tuple[LoadGroup, ...]
    dtypes: dict[str, torch.dtype]
    missing: tuple[str, ...]
    files: dict[str, int]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter or buffer → its shape when the files were planned."""
        return {name: shape for group in self.groups for name, shape in group.targets.items()}


@dataclass
class PendingLoad:
    """A plan on its model.

    Attributes:
        guard: the hook that stops a forward before the weights are there.
        origins: name in the model → the weight of the files that it stands for; None until `settle`.
    """

    plan: LoadPlan
    guard: Any
    origins: dict[str, Origin] | None = None


@patch(
    "transformers.PreTrainedModel._load_pretrained_model",
    why="accel_moe.from_pretrained is transformers' own, up to the reading: it has resolved the files, the dtype and "
    "the conversions by then, and offers no hook to stop there. In place only while from_pretrained runs.",
    tested=TRANSFORMERS,
)
def make_plan(
    original: Callable[..., Any],
    model: Any,
    state_dict: Any,
    checkpoint_files: Sequence[str] | None,
    load_config: Any,
    expected_keys: Any = None,
) -> Any:
    """Stands in for transformers' `_load_pretrained_model`: reads headers only; `model` stays on meta, with a plan.

    Returns what transformers' function returns. Not a collective; every rank checks every file.

    Raises:
        ValueError: the checkpoint is not safetensors, a file is missing or truncated, or a weight has another shape
            than the config says.
    """
    name = str(load_config.pretrained_model_name_or_path)
    if load_config.hf_quantizer is not None:
        refuse_quantised(name, model.config)
        raise ValueError(f"{name} would be quantised while loading, which shards cannot be. {PLAIN_ROAD}")
    files = [str(file) for file in checkpoint_files or []]
    _refuse_other_formats(name, files)
    stored = read_headers(files)
    info, offload = dry_load(original, model, stored, load_config)
    _refuse_mismatched(name, info, load_config.ignore_mismatched_sizes)
    groups = load_groups(model, stored, load_config.weight_mapping or [])
    _untie_different(model, groups, info)
    absent = set(info.missing_keys) | {mismatch[0] for mismatch in info.mismatched_keys}
    groups = [group for group in (group.of(lambda name: name not in absent) for group in groups) if group.targets]
    found = {target for group in groups for target in group.targets}
    _refuse_other_match(found, {key for key in model.state_dict() if key not in absent})
    tensors = named_tensors(model)
    plan = LoadPlan(
        name=name,
        groups=tuple(groups),
        dtypes={target: tensors[target].dtype for target in found},
        missing=tuple(sorted(absent - set(getattr(model, "all_tied_weights_keys", {})))),
        files={file: os.path.getsize(file) for file in files},
    )
    for target in found:
        defer(tensors[target], target)
    model._accel_moe_load = PendingLoad(plan, model.register_forward_pre_hook(_not_loaded))
    return info, offload


def _not_loaded(module: nn.Module, args: Any) -> None:
    raise RuntimeError(
        "This model came from accel_moe.from_pretrained() and has no weights yet: they are read inside "
        "accelerator.prepare(model, optimizer). Call that before the first forward."
    )


def _refuse_other_formats(name: str, files: Sequence[str]) -> None:
    if files and all(file.endswith(".safetensors") for file in files):
        return
    found = ", ".join(os.path.basename(file) for file in files[:3]) or "no weight files"
    raise ValueError(
        f"{name} has {found}; accel_moe.from_pretrained() reads safetensors only, the one format that can be read "
        "in parts. Load it with transformers' from_pretrained and save_pretrained() it once, or pass that model "
        "to accel_moe.prepare(model)."
    )


def _refuse_mismatched(name: str, info: Any, ignore_mismatched_sizes: bool) -> None:
    if info.conversion_errors:
        key, error = next(iter(info.conversion_errors.items()))
        raise ValueError(
            f"{name}: the tensors of {key} cannot be put together: {str(error).strip().splitlines()[-1]}. The "
            "checkpoint is incomplete, or belongs to another config."
        )
    if info.mismatched_keys and not ignore_mismatched_sizes:
        lines = [_mismatch(*mismatch) for mismatch in sorted(info.mismatched_keys, key=lambda m: m[0])]
        raise ValueError(
            f"{name} does not fit its config: {first_few(lines)}. Give the config that belongs to it; "
            "ignore_mismatched_sizes=True would initialise these weights anew."
        )


def _mismatch(key: str, found: Iterable[int], wanted: Iterable[int]) -> str:
    found, wanted = tuple(found), tuple(wanted)
    if ".experts." in key and len(found) == len(wanted) and found[0] != wanted[0]:
        return f"{key} has {found[0]} experts in the checkpoint, {wanted[0]} in the config"
    return f"{key} has shape {found} in the checkpoint, {wanted} by the config"


def _refuse_other_match(found: set[str], expected: set[str]) -> None:
    if found != expected:
        raise RuntimeError(
            f"accel_moe and transformers match this checkpoint's keys differently ({sorted(found ^ expected)[:3]}). "
            "Install a tested transformers, or load with its own from_pretrained and accel_moe.prepare(model)."
        )


def _untie_different(model: Any, groups: list[LoadGroup], info: Any) -> None:
    """Weights that the config ties and the checkpoint has twice: tied if they are equal, as transformers does.

    transformers compares values, which a model on meta does not have; here the file's are compared.
    """
    by_name = {group.name: group for group in groups if group.method == "copy"}
    for target, source in list(getattr(model, "all_tied_weights_keys", {}).items()):
        if target in info.missing_keys or source in info.missing_keys:
            continue
        pair = [by_name.get(target), by_name.get(source)]
        if None not in pair and _same_values(*(next(iter(g.sources.values()))[0] for g in pair)):  # type: ignore
            info.missing_keys.add(target)  # tie_weights then ties it to the one that is there
        else:
            logger.warning("%s and %s differ in the checkpoint, and are not tied as the config says", target, source)
            del model.all_tied_weights_keys[target]


def _same_values(one: HubTensor, other: HubTensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    with Reader() as reader:
        for first in range(0, one.size_bytes, STAGING_BYTES):
            count = min(STAGING_BYTES, one.size_bytes - first)
            a, b = (torch.empty(count, dtype=torch.uint8) for _ in range(2))
            reader.into(a, one.file, one.start + first)
            reader.into(b, other.file, other.start + first)
            if not torch.equal(a, b):
                return False
    return True


# --- the plan on its model


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by plain name, a tied one under each of its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {plain_name(name): tensor for name, tensor in named}


def pending(model: nn.Module) -> PendingLoad | None:
    """The plan that from_pretrained left on this model, however it was wrapped since; None once it is filled."""
    return next((m.__dict__["_accel_moe_load"] for m in model.modules() if "_accel_moe_load" in m.__dict__), None)


def watch_edits(loaded: Any) -> None:
    """Count changes in place from here on. `loaded` is from_pretrained's result: a model, or a tuple with it first."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    for tensor in named_tensors(model).values():
        watch(tensor)


def check_unchanged(model: nn.Module, plan: LoadPlan) -> dict[str, Origin]:
    """Name in `model` → the weight of the files that it stands for. Not a collective.

    Raises:
        ValueError: an edit of the model cannot be kept, or a file has changed.
    """
    found = edits.origins(plan.name, named_tensors(model), plan.shapes)
    for file, size_bytes in plan.files.items():
        if not os.path.isfile(file) or os.path.getsize(file) != size_bytes:
            raise ValueError(f"{file} is gone or has changed since accel_moe.from_pretrained() read its header.")
    return found


def check_together(models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """`check_unchanged` on every rank, and the same edits on all of them. A collective over the world.

    Raises:
        ValueError: on every rank, if one of them has an error or another model, or if an optimizer holds a parameter
            that its model does not have any more.
    """
    own = {id(parameter) for model in models for parameter in model.parameters()}
    for model in models:
        if (waiting := pending(model)) is None:
            continue

        def check(model: nn.Module = model, plan: LoadPlan = waiting.plan) -> None:
            check_unchanged(model, plan)
            edits.check_optimizers(optimizers, own)

        ranks.run_or_raise_everywhere("accelerator.prepare", check, ValueError, over=dist.group.WORLD)
        edits.check_ranks(named_tensors(model))


def settle(model: nn.Module) -> dict[str, Origin]:
    """The result of `check_unchanged`, kept for `fill`; from here on the model's tensors are ordinary ones on meta."""
    waiting = pending(model)
    assert waiting is not None, "settle() needs a model with a load plan"
    if waiting.origins is None:
        waiting.origins = check_unchanged(model, waiting.plan)
        for tensor in named_tensors(model).values():
            deferred_tensors.settle(tensor)
    return waiting.origins


def memory_saved(model: nn.Module) -> str:
    """A log line: host memory that accel_moe.from_pretrained would have saved; "" if none."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    tensors = {id(p): p for p in model.parameters() if not p.is_meta}
    held = sum(p.nbytes for p in tensors.values())
    if world_size == 1 or pending(model) is not None or not held:
        return ""
    return (
        f"each of {world_size} ranks holds the whole model in RAM ({held / 1e9:.1f} GB) until accelerator.prepare; "
        f"accel_moe.from_pretrained() would read {held / world_size / 1e9:.1f} GB into the shards of each instead"
    )
