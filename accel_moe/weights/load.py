"""Hub weights straight into the shards: every rank reads the bytes it owns, and no rank ever holds the model.

    from_pretrained (api.py)                 inside accelerator.prepare (in_accelerator.py)
    ------------------------                 -----------------------------------------------
    config, class, generation config:        experts sharded over (efsdp, ep), on meta
      transformers' own from_pretrained      the rest wrapped by accelerate, on meta
    headers -> LoadPlan, model on meta       memory for the shards -> `fill`: bytes into the shards
    missing weights and buffers: real        an optimizer made before gets its parameters back by name

What the file lacks (a new head), and buffers that no file has, are made at once by transformers' own
initialisation: they consume the random numbers that a plain from_pretrained would, and are sharded as any weight.

Between the two a user may edit the model: each weight of the files is a tensor that knows it (deferred_tensors.py), so
that its values follow it to wherever it is now; what has values of its own keeps them (edits.py).

A rank reads in file order, with plain reads through the page cache: ranks of one node march through the file
together, each taking its own bytes, so that the disk is asked for each byte about once. Where a parameter's rows lie
in the file as they do in memory (renamed weights, stacked experts: nearly all bytes) they are read into the shard
itself; the rest passes through transformers' transforms, one group at a time. hub_loading.py decides which.

The seam is the one torchtitan uses (meta model, shard, allocate, fill); a file's tensors are placed there by DCP's
planner, here by transformers' renaming, so that every family it can load can be loaded.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from accel_moe import ranks
from accel_moe.names import plain_name
from accel_moe.patching import TRANSFORMERS, patch
from accel_moe.weights import deferred_tensors, edits, hub_loading
from accel_moe.weights.deferred_tensors import Origin, defer, watch
from accel_moe.weights.file_reader import STAGING_BYTES, Reader
from accel_moe.weights.hub_loading import LoadGroup, StoredTensor

logger = logging.getLogger("accel_moe")

AHEAD = 4
"""How many pieces before it is read the kernel is told of one."""

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


@dataclass(frozen=True)
class LoadPlan:
    """What a rank needs to fill the model that carries the plan.

    Attributes:
        name: as given to from_pretrained.
        groups: what to read.
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
    def size_bytes(self) -> int:
        return sum(t.size_bytes for g in self.groups for ts in g.sources.values() for t in ts)


@dataclass(frozen=True)
class LoadReport:
    """What `fill` did on this rank. `model._accel_moe_load_report` keeps it."""

    read_bytes: int
    owned_bytes: int
    seconds: float


@dataclass
class PendingLoad:
    """A plan on its model, and the hook that stops a forward before the weights are there.

    `origins` is what `settle` found: the weight of the files that each name in the model stands for.
    """

    plan: LoadPlan
    guard: Any
    origins: dict[str, Origin] | None = None


# --- deciding, before any rank exists -----------------------------------------------------------------------------


def deferred(environ: Mapping[str, str]) -> bool:
    """Whether weights wait for accelerator.prepare: in a launch that uses, or may come to use, FSDP2.

    One process without FSDP loads at once, and so do DeepSpeed, Megatron and FSDP1, which want the whole model.
    """
    from accelerate.state import AcceleratorState, is_initialized

    if is_initialized():
        state = AcceleratorState()
        plugin = getattr(state, "fsdp_plugin", None)
        return plugin is not None and plugin.fsdp_version == 2
    if environ.get("ACCELERATE_USE_DEEPSPEED", "") == "true" or environ.get("ACCELERATE_USE_MEGATRON_LM", "") == "true":
        return False
    if environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        return environ.get("FSDP_VERSION", "2") == "2"  # the launcher always says; Trainer sets no version here
    return int(environ.get("WORLD_SIZE", 1)) > 1  # the Accelerator may still be given an FSDP2 plugin


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
        "quantization config's dequantize=True, and pass the model to accel_moe.prepare(model)."
    )


def read_config(name: str | os.PathLike, arguments: Mapping[str, Any]) -> Any:
    """The config that from_pretrained will use, or None where only it can tell."""
    from transformers import AutoConfig, PreTrainedConfig

    config = arguments.get("config")
    if isinstance(config, PreTrainedConfig):
        return config
    passed_on = (
        "cache_dir",
        "force_download",
        "local_files_only",
        "token",
        "revision",
        "subfolder",
        "trust_remote_code",
    )
    try:
        return AutoConfig.from_pretrained(config or name, **{k: arguments[k] for k in passed_on if k in arguments})
    except (OSError, ValueError):  # an adapter's folder, or code that must be trusted: from_pretrained says it better
        return None


def saving(model: nn.Module) -> str:
    """In words, what `from_pretrained` would have saved a model that is real on every rank; "" where nothing."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    tensors = {id(p): p for p in model.parameters() if not p.is_meta}
    held = sum(p.nbytes for p in tensors.values())
    if ranks == 1 or pending(model) is not None or not held:
        return ""
    return (
        f"each of {ranks} ranks holds the whole model in RAM ({held / 1e9:.1f} GB) until accelerator.prepare; "
        f"accel_moe.from_pretrained() would read {held / ranks / 1e9:.1f} GB into the shards of each instead"
    )


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
    files = list(checkpoint_files or [])
    if not files or not all(str(f).endswith(".safetensors") for f in files):
        found = ", ".join(os.path.basename(str(f)) for f in files[:3]) or "no weight files"
        raise ValueError(
            f"{name} has {found}; accel_moe.from_pretrained() reads safetensors only, the one format that can be read "
            "in parts. Load it with transformers' from_pretrained and save_pretrained() it once, or pass that model "
            "to accel_moe.prepare(model)."
        )
    stored = hub_loading.stored_tensors([str(f) for f in files])
    info, offload = hub_loading.plan_load(original, model, stored, load_config)
    _refuse_mismatched(name, info, load_config.ignore_mismatched_sizes)
    groups = hub_loading.load_groups(model, stored, load_config.weight_mapping or [])
    _untie_different(model, groups, info)
    absent = set(info.missing_keys) | {mismatch[0] for mismatch in info.mismatched_keys}
    tensors = _named_tensors(model)
    kept = []
    for group in groups:
        targets = {target: shape for target, shape in group.targets.items() if target not in absent}
        if targets:
            kept.append(replace(group, targets=targets))
    found = {target for group in kept for target in group.targets}
    expected = {key for key in model.state_dict() if key not in absent}
    if found != expected:
        raise RuntimeError(
            f"accel_moe and transformers match this checkpoint's keys differently ({sorted(found ^ expected)[:3]}). "
            "Install a tested transformers, or load with its own from_pretrained and accel_moe.prepare(model)."
        )
    plan = LoadPlan(
        name=name,
        groups=tuple(kept),
        dtypes={target: tensors[target].dtype for target in found},
        missing=tuple(sorted(absent - set(getattr(model, "all_tied_weights_keys", {})))),
        files={str(f): os.path.getsize(f) for f in files},
    )
    for name in found:
        defer(tensors[name], name)
    model._accel_moe_load = PendingLoad(plan, model.register_forward_pre_hook(_not_loaded))
    return info, offload


def _not_loaded(module: nn.Module, args: Any) -> None:
    raise RuntimeError(
        "This model came from accel_moe.from_pretrained() and has no weights yet: they are read inside "
        "accelerator.prepare(model, optimizer). Call that before the first forward."
    )


def _refuse_mismatched(name: str, info: Any, ignore_mismatched_sizes: bool) -> None:
    if info.conversion_errors:
        key, error = next(iter(info.conversion_errors.items()))
        raise ValueError(
            f"{name}: the tensors of {key} cannot be put together: {str(error).strip().splitlines()[-1]}. The "
            "checkpoint is incomplete, or belongs to another config."
        )
    lines = []
    for key, found, wanted in sorted(info.mismatched_keys, key=lambda m: m[0])[:3]:
        found, wanted = tuple(found), tuple(wanted)
        if ".experts." in key and len(found) == len(wanted) and found[0] != wanted[0]:
            lines.append(f"{key} has {found[0]} experts in the checkpoint, {wanted[0]} in the config")
        else:
            lines.append(f"{key} has shape {found} in the checkpoint, {wanted} by the config")
    if lines and not ignore_mismatched_sizes:
        more = len(info.mismatched_keys) - len(lines)
        raise ValueError(
            f"{name} does not fit its config: {'; '.join(lines)}{f' (and {more} more)' if more > 0 else ''}. Give the "
            "config that belongs to it; ignore_mismatched_sizes=True would initialise these weights anew."
        )


def _untie_different(model: Any, groups: list[LoadGroup], info: Any) -> None:
    """Weights that the config ties and the checkpoint has twice: tied if they are equal, as transformers does.

    transformers compares values, which a model on meta does not have; here the file's are compared.
    """
    by_name = {group.name: group for group in groups if group.road == "copy"}
    for target, source in list(getattr(model, "all_tied_weights_keys", {}).items()):
        if target in info.missing_keys or source in info.missing_keys:
            continue
        pair = [by_name.get(target), by_name.get(source)]
        if None not in pair and _same_values(*(next(iter(g.sources.values()))[0] for g in pair)):  # type: ignore
            info.missing_keys.add(target)  # tie_weights then ties it to the one that is there
        else:
            logger.warning("%s and %s differ in the checkpoint, and are not tied as the config says", target, source)
            del model.all_tied_weights_keys[target]


def _same_values(one: StoredTensor, other: StoredTensor) -> bool:
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


# --- finding the plan again -----------------------------------------------------------------------------------------


def pending(model: nn.Module) -> PendingLoad | None:
    """The plan that from_pretrained left on this model, however it was wrapped since; None once it is filled."""
    return next((m.__dict__["_accel_moe_load"] for m in model.modules() if "_accel_moe_load" in m.__dict__), None)


def watch_edits(loaded: Any) -> None:
    """What from_pretrained returns, a model or a tuple with it, is the user's from here on."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    for tensor in _named_tensors(model).values():
        watch(tensor)


def check_unchanged(model: nn.Module, plan: LoadPlan) -> dict[str, Origin]:
    """By name in `model`: the weight of the files that it stands for. Not a collective.

    Raises:
        ValueError: an edit of the model cannot be kept, or a file has changed.
    """
    planned = {name: shape for group in plan.groups for name, shape in group.targets.items()}
    found = edits.origins(plan.name, _named_tensors(model), planned)
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
        error = None
        try:
            check_unchanged(model, waiting.plan)
            edits.check_optimizers(optimizers, own)
        except ValueError as problem:
            error = problem
        edits.check_ranks(_named_tensors(model), error)


def settle(model: nn.Module) -> dict[str, Origin]:
    """The same as `check_unchanged`, kept for `fill`; from here on the model's tensors are ordinary ones on meta."""
    waiting = pending(model)
    assert waiting is not None, "settle() needs a model with a load plan"
    if waiting.origins is None:
        waiting.origins = check_unchanged(model, waiting.plan)
        for tensor in _named_tensors(model).values():
            deferred_tensors.settle(tensor)
    return waiting.origins


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by clean name, a tied one under each of its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {plain_name(name): tensor for name, tensor in named}


# --- filling, on the ranks ------------------------------------------------------------------------------------------


@torch.no_grad()
def share_real(model: nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's values of what has values by now: seeds may differ between ranks.

    That is what the checkpoint lacks, and what a user put into the model. A collective over the world, if there is
    one. Call it before anything is sharded.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    saved = {plain_name(key) for key in model.state_dict()}  # buffers that are not saved are each rank's own
    done: set[int] = set()
    for name, tensor in sorted(_named_tensors(model).items()):
        if name in saved and not tensor.is_meta and id(tensor) not in done:
            done.add(id(tensor))
            value = tensor.detach().to(device, copy=True).contiguous()
            dist.broadcast(value, src=0)
            tensor.copy_(value)


@torch.no_grad()
def fill(model: nn.Module, device: torch.device) -> LoadReport:
    """Give every parameter and buffer of a planned model memory on `device`, and its values from the files.

    Call it on every rank when the model is sharded as it will stay (or not at all: then it becomes whole). A
    collective where torch.distributed is initialised: a rank that fails makes all of them raise.

    Raises:
        RuntimeError: some rank could not read.
    """
    waiting = pending(model)
    assert waiting is not None, "fill() needs a model with a load plan"
    error, report = None, None
    try:
        report = _fill(model, waiting.plan, device)
    except Exception as problem:
        error = problem
    ranks.raise_everywhere("Loading the weights", error, RuntimeError, over=dist.group.WORLD)
    assert report is not None
    waiting.guard.remove()
    for module in model.modules():
        if module.__dict__.pop("_accel_moe_load", None) is not None:
            module._accel_moe_load_report = report
    if ranks.is_rank0():
        logger.info(
            "%s: this rank read %.2f GB for its %.2f GB in %.1f s (%.2f GB/s)",
            waiting.plan.name,
            report.read_bytes / 1e9,
            report.owned_bytes / 1e9,
            report.seconds,
            report.read_bytes / 1e9 / max(report.seconds, 1e-9),
        )
    return report


def _fill(model: nn.Module, plan: LoadPlan, device: torch.device) -> LoadReport:
    started = time.perf_counter()
    origins = settle(model)
    _allocate(model, device)
    read_bytes = sum(read_into(places, plan, model) for places in _rounds(model, origins))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    left = [name for name, tensor in _named_tensors(model).items() if tensor.is_meta]
    assert not left, f"no values for {left}"
    places = (Place.of(tensor) for tensor in _named_tensors(model).values())
    owned = {place.local.data_ptr(): place.local.nbytes for place in places if place.local.numel()}
    return LoadReport(read_bytes, sum(owned.values()), time.perf_counter() - started)


def _rounds(model: nn.Module, origins: Mapping[str, Origin]) -> list[dict[str, Place]]:
    """Places by the weight's name in the files. One mapping, and another for each time that a weight was copied."""
    places: dict[str, dict[int, Place]] = {}
    for name, tensor in _named_tensors(model).items():
        if (origin := origins.get(name)) is not None:
            places.setdefault(origin.name, {})[id(tensor)] = replace(Place.of(tensor), casts=origin.casts)
    count = max((len(of_one) for of_one in places.values()), default=0)
    found: list[dict[str, Place]] = [{} for _ in range(count)]
    for name, of_one in places.items():
        for at, place in enumerate(of_one.values()):
            found[at][name] = place
    return found


def read_into(places: Mapping[str, Place], plan: LoadPlan, model: nn.Module) -> int:
    """Give the places their values, by the weights' names in the files; the bytes that were read.

    A weight without a place (of a layer that was dropped) is not read. `model` is only asked for its config.
    """
    copies: list[Copy] = []
    conversions: list[LoadGroup] = []
    for group in (left for group in plan.groups if (left := _of_places(group, places)).targets):
        if group.road == "copy":
            copies += _copies_of_renamed(group, places[group.name], plan)
        elif group.road == "stack":
            copies += _copies_of_stack(group, places[group.name], plan)
        else:
            conversions.append(group)
    copies = _joined(sorted(copies, key=lambda c: (c.file, c.start)))
    expected = sum(c.size_bytes for c in copies) + sum(_bytes_of_conversion(g, places) for g in conversions)
    with Reader(expected) as reader, ThreadPoolExecutor(_threads(), initializer=_same_gpu(places)) as pool:
        running = [pool.submit(_run_one, reader, copies, i) for i in range(len(copies))]
        try:
            for group in sorted(conversions, key=_first_byte):
                _convert_into(group, places, plan, model, reader)
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return reader.read_bytes


def _of_places(group: LoadGroup, places: Mapping[str, Place]) -> LoadGroup:
    return replace(group, targets={name: shape for name, shape in group.targets.items() if name in places})


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Memory for what is on meta. Parameters stay the same objects: ties, optimizers and FSDP go on holding them."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@dataclass(frozen=True)
class Place:
    """Where a parameter's values go on this rank: `local` [count, ...] holds rows first .. first + count of it.

    `casts` are the dtypes that they pass through on their way: a user cast the model before.
    """

    local: torch.Tensor
    first: int
    count: int
    casts: tuple[torch.dtype, ...] = ()

    @staticmethod
    def of(tensor: torch.Tensor) -> Place:
        if isinstance(tensor, DTensor):
            first, count = own_rows(
                tensor.shape[0], tensor.placements, tensor.device_mesh.shape, tensor.device_mesh.get_coordinate()
            )
            local = tensor._local_tensor
            assert local.shape[0] == count, (local.shape, first, count)
            return Place(local, first, count)
        local = tensor.detach()
        return Place(local, 0, local.shape[0] if local.dim() else 1)


def own_rows(rows: int, placements: Sequence[Any], mesh_shape: Sequence[int], coordinate: Any) -> tuple[int, int]:
    """(first, count) of the rows of dim 0 that a rank holds. Pure.

    Plain shards cut first, left to right; a strided one (FSDP over what ep has cut) after them. Each cut is
    torch.chunk's: ceil(rows / ranks) to each rank, the last ones less or none.
    """
    first = 0
    strided = [type(p).__name__ == "_StridedShard" for p in placements]
    assert sum(strided) <= 1, placements
    for late in (False, True):
        for placement, is_late, size, at in zip(placements, strided, mesh_shape, coordinate):
            if placement.is_replicate() or is_late is not late:
                continue
            if placement.dim != 0:
                raise ValueError(f"placements {tuple(placements)}: only dim 0 can be sharded while loading")
            step = -(-rows // size)
            first += min(at * step, rows)
            rows = max(0, min(step, rows - at * step))
    return first, rows


@dataclass(frozen=True)
class Copy:
    """`to` (flat, contiguous) gets the stored values from byte `start` of `file` on.

    They go through `via` first: the dtype that from_pretrained gives the parameter, and those that a user cast it to.
    Mixed precision may have made it fp32 since.
    """

    file: str
    start: int
    dtype: torch.dtype
    via: tuple[torch.dtype, ...]
    to: torch.Tensor

    @property
    def size_bytes(self) -> int:
        return self.to.numel() * self.dtype.itemsize

    def run(self, reader: Reader) -> None:
        if {self.to.dtype, *self.via} == {self.dtype} and self.to.device.type == "cpu":
            reader.into(self.to, self.file, self.start)
            return
        at_once = STAGING_BYTES // self.dtype.itemsize
        for first in range(0, self.to.numel(), at_once):
            to = self.to[first : first + at_once]
            staged = reader.staging(to.device)[: to.numel() * self.dtype.itemsize].view(self.dtype)
            reader.into(staged, self.file, self.start + first * self.dtype.itemsize)
            # Blocking: the next piece goes into the same staging memory.
            to.copy_(_cast(staged.to(to.device), self.via))


def _cast(tensor: torch.Tensor, dtypes: Sequence[torch.dtype]) -> torch.Tensor:
    for dtype in dtypes:
        tensor = tensor.to(dtype)
    return tensor


def _run_one(reader: Reader, copies: Sequence[Copy], i: int) -> None:
    """Read the i-th, and let the kernel fetch a later one meanwhile: a cold disk is kept busy by few threads."""
    for ahead in copies[i + AHEAD : i + AHEAD + 1]:
        reader.will_need(ahead.file, ahead.start, ahead.size_bytes)
    copies[i].run(reader)


def _copies_of_renamed(group: LoadGroup, place: Place, plan: LoadPlan) -> list[Copy]:
    ((source,),) = group.sources.values()
    if not place.local.numel():
        return []
    row_bytes = source.size_bytes // source.shape[0] if source.shape else 0
    start = source.start + place.first * row_bytes
    via = plan.dtypes[group.name], *place.casts
    return [Copy(source.file, start, source.dtype, via, _flat(place.local))]


def _copies_of_stack(group: LoadGroup, place: Place, plan: LoadPlan) -> list[Copy]:
    copies = []
    via = plan.dtypes[group.name], *place.casts
    for row in range(place.count):
        to, at = _flat(place.local[row]), 0
        for tensors in group.sources.values():
            source = tensors[place.first + row]
            count = torch.Size(source.shape).numel()
            copies.append(Copy(source.file, source.start, source.dtype, via, to[at : at + count]))
            at += count
        assert at == to.numel(), group.name
    return copies


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.is_contiguous()
    return tensor.view(-1)


def _joined(copies: list[Copy]) -> list[Copy]:
    """Neighbours in the file that are neighbours in memory, too, become one; large ones are cut for the threads."""
    joined: list[Copy] = []
    for copy in copies:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.file, last.dtype, last.via, last.to.dtype) == (copy.file, copy.dtype, copy.via, copy.to.dtype)
            and last.start + last.size_bytes == copy.start
            and last.to.data_ptr() + last.to.nbytes == copy.to.data_ptr()
            and last.to.untyped_storage().data_ptr() == copy.to.untyped_storage().data_ptr()
            and last.size_bytes < STAGING_BYTES
        ):
            whole = last.to.as_strided((last.to.numel() + copy.to.numel(),), (1,))
            joined[-1] = replace(last, to=whole)
        else:
            joined.append(copy)
    pieces = []
    for copy in joined:
        at_once = 4 * STAGING_BYTES // copy.dtype.itemsize
        for first in range(0, copy.to.numel(), at_once):
            start = copy.start + first * copy.dtype.itemsize
            pieces.append(replace(copy, start=start, to=copy.to[first : first + at_once]))
    return pieces


def _rows_to_read(group: LoadGroup, places: Mapping[str, Place]) -> tuple[int, int] | None:
    """(first, count) of the rows to convert, or None for all."""
    first = {(places[name].first, places[name].count) for name in group.targets}
    return first.pop() if group.road == "rows" and len(first) == 1 else None


def _sources_to_read(
    group: LoadGroup, places: Mapping[str, Place]
) -> dict[str, list[tuple[StoredTensor, tuple[int, int] | None]]]:
    """By pattern: the tensors to read, each whole (None) or some of its rows."""
    rows = _rows_to_read(group, places)
    if rows is None:
        return {pattern: [(t, None) for t in ts] for pattern, ts in group.sources.items()}
    first, count = rows
    total = next(iter(group.targets.values()))[0]
    behind = len(next(iter(group.targets.values())))
    chosen: dict[str, list[tuple[StoredTensor, tuple[int, int] | None]]] = {}
    for pattern, ts in group.sources.items():
        listed = len(ts) == total and len(ts[0].shape) == behind - 1
        chosen[pattern] = [(t, None) for t in ts[first : first + count]] if listed else [(ts[0], rows)]
    return chosen


def _bytes_of_conversion(group: LoadGroup, places: Mapping[str, Place]) -> int:
    if all(places[name].local.numel() == 0 for name in group.targets):
        return 0
    chosen = [one for ones in _sources_to_read(group, places).values() for one in ones]
    return sum(t.size_bytes if rows is None else t.size_bytes // t.shape[0] * rows[1] for t, rows in chosen)


def _convert_into(
    group: LoadGroup, places: Mapping[str, Place], plan: LoadPlan, model: nn.Module, reader: Reader
) -> None:
    if all(places[name].local.numel() == 0 for name in group.targets):
        return
    dtype = plan.dtypes.get(group.name) or plan.dtypes[next(iter(group.targets))]
    chosen = _sources_to_read(group, places)
    tensors = {p: [reader.tensor(t, rows).to(dtype) for t, rows in ones] for p, ones in chosen.items()}
    converted = hub_loading.convert(group, tensors, AsPlanned(model, plan))
    rows = _rows_to_read(group, places)
    for name in group.targets:
        place, value = places[name], converted[name]
        if rows is None and value.dim():
            value = value.narrow(0, place.first, place.count)
        place.local.copy_(_cast(value, (plan.dtypes[name], *place.casts)))


class AsPlanned:
    """A model as a transform may ask for it: the parameters that were planned, whatever the model was edited into."""

    def __init__(self, model: nn.Module, plan: LoadPlan):
        self._model = model
        self._plan = plan
        self._shapes = {name: shape for group in plan.groups for name, shape in group.targets.items()}

    def get_parameter(self, name: str) -> torch.Tensor:
        if name not in self._shapes:
            return self._model.get_parameter(name)
        return torch.empty(self._shapes[name], dtype=self._plan.dtypes[name], device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _first_byte(group: LoadGroup) -> tuple[str, int]:
    return min((t.file, t.start) for ts in group.sources.values() for t in ts)


def _threads() -> int:
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(4, (os.cpu_count() or 1) // local_world_size))


def _same_gpu(places: Mapping[str, Place]) -> Callable[[], None]:
    """For each reading thread: a new thread starts on GPU 0, and pinning memory there would open a context on it."""
    devices = {place.local.device for place in places.values() if place.local.device.type == "cuda"}
    return functools.partial(torch.cuda.set_device, devices.pop()) if devices else lambda: None


@contextmanager
def quiet_but_rank_0() -> Iterator[None]:
    """Within it, transformers' load report comes from rank 0 alone, and no rank takes accelerate's short cut of
    loading on rank 0 only."""
    from transformers.utils import logging as transformers_logging

    shortcut = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    verbosity = transformers_logging.get_verbosity()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if not ranks.is_rank0():
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shortcut is None:
            del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
        else:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = shortcut
