"""Values read from the files into the shards of this rank.

A rank reads in file order, with plain reads through the page cache. Ranks of one node march through the file together,
each taking its own bytes, so that the disk is asked for each byte about once. Where a parameter's rows lie in the file
as they do in memory (renamed weights, stacked experts: nearly all bytes) they are read into the shard itself (`Copy`).
The rest passes through transformers' transforms, one group at a time (`Conversion`). load_groups.py decides which.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from accel_moe import ranks
from accel_moe.experts.pack import pack_experts, packings
from accel_moe.experts.state import prepared_state
from accel_moe.names import plain_name
from accel_moe.weights.load_groups import LoadGroup, convert
from accel_moe.weights.place import Place, places_of
from accel_moe.weights.plan import LoadPlan, named_tensors, pending, settle
from accel_moe.weights.safetensors import STAGING_BYTES, HubTensor, Reader

logger = logging.getLogger("accel_moe")

AHEAD = 4
"""How many pieces before it is read the kernel is told of one."""


@dataclass(frozen=True)
class LoadReport:
    """Counts of one `fill` on this rank; the model keeps it as `_accel_moe_load_report`."""

    read_bytes: int  # from the files
    owned_bytes: int  # of the shards
    seconds: float


@torch.no_grad()
def share_real(model: nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's values of the tensors that are real by now: seeds may differ between ranks.

    Real are the weights that the checkpoint lacks, and those that a user put into the model. A collective over the
    world, if there is one. Call it before anything is sharded.
    """
    if not ranks.distributed():
        return
    saved = {plain_name(key) for key in model.state_dict()}  # buffers that are not saved are each rank's own
    done: set[int] = set()
    for name, tensor in sorted(named_tensors(model).items()):
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
    read = functools.partial(_fill, model, waiting.plan, device)
    report = ranks.run_or_raise_everywhere("Loading the weights", read, RuntimeError, over=dist.group.WORLD)
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
    pack_experts(model, prepared_state(model), device)
    _allocate(model, device)
    places = places_of(named_tensors(model), origins, packings(model))
    read_bytes = sum(read_into(some, plan, model) for some in places)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    left = [name for name, tensor in named_tensors(model).items() if tensor.is_meta]
    assert not left, f"no values for {left}"
    places = (Place.of(tensor) for tensor in named_tensors(model).values())
    owned = {place.local.data_ptr(): place.local.nbytes for place in places if place.local.numel()}
    return LoadReport(read_bytes, sum(owned.values()), time.perf_counter() - started)


def read_into(places: Mapping[str, Place], plan: LoadPlan, model: nn.Module) -> int:
    """Give the places their values, by the weights' names in the files. Returns the bytes that were read.

    A weight without a place (of a layer that was dropped) is not read. `model` is only asked for its config.
    """
    copies: list[Copy] = []
    conversions: list[Conversion] = []
    packed: list[PackedRows] = []
    for group in (left for group in plan.groups if (left := group.of(places.__contains__)).targets):
        if any(places[name].packing for name in group.targets):
            packed += PackedRows.of(group, places, plan)
        else:
            some, others = _pieces_of(group, places, plan)
            copies, conversions = copies + some, conversions + others
    copies = _joined(sorted(copies, key=lambda c: (c.file, c.start)))
    packed.sort(key=lambda rows: rows.first_byte)
    expected = sum(piece.size_bytes for piece in (*copies, *conversions, *packed))
    with Reader(expected) as reader, ThreadPoolExecutor(_threads(), initializer=_same_gpu(places)) as pool:
        running = [pool.submit(_run_one, reader, copies, i) for i in range(len(copies))]
        running += [pool.submit(rows.run, reader, places, plan, model) for rows in packed if not rows.converts]
        try:
            for conversion in sorted(conversions, key=lambda c: c.first_byte):
                conversion.run(reader, places, plan, model)
            for rows in (rows for rows in packed if rows.converts):
                rows.run(reader, places, plan, model)
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return reader.read_bytes


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Give tensors on meta memory. Parameters stay the same objects: ties, optimizers and FSDP go on holding them."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


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

    @property
    def first_byte(self) -> tuple[str, int]:
        return self.file, self.start

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


def _pieces_of(group: LoadGroup, places: Mapping[str, Place], plan: LoadPlan) -> tuple[list[Copy], list[Conversion]]:
    """The reads that give the group's places their values."""
    if group.method == "copy":
        return _copies_of_renamed(group, places[group.name], plan), []
    if group.method == "stack":
        return _copies_of_stack(group, places[group.name], plan), []
    if any(places[name].local.numel() for name in group.targets):
        return [], [Conversion.of(group, places)]
    return [], []


def _cast(tensor: torch.Tensor, dtypes: Sequence[torch.dtype]) -> torch.Tensor:
    for dtype in dtypes:
        tensor = tensor.to(dtype)
    return tensor


def _run_one(reader: Reader, copies: Sequence[Copy], i: int) -> None:
    """Read the i-th, and let the kernel fetch a later one beside it: a cold disk is kept busy by few threads."""
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
    return [Copy(source.file, start, source.torch_dtype, via, _flat(place.local))]


def _copies_of_stack(group: LoadGroup, place: Place, plan: LoadPlan) -> list[Copy]:
    copies = []
    via = plan.dtypes[group.name], *place.casts
    for row in range(place.count):
        to, at = _flat(place.local[row]), 0
        for tensors in group.sources.values():
            source = tensors[place.first + row]
            count = math.prod(source.shape)
            copies.append(Copy(source.file, source.start, source.torch_dtype, via, to[at : at + count]))
            at += count
        assert at == to.numel(), group.name
    return copies


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.is_contiguous()
    return tensor.view(-1)


def _joined(copies: list[Copy]) -> list[Copy]:
    """The copies, in file order, with neighbours in file and memory joined, and large ones cut for the threads."""
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


@dataclass(frozen=True)
class Conversion:
    """A group that passes through its transform on its way to this rank.

    Attributes:
        rows: (first, count) of the rows to make, the same for all targets; None makes all.
        sources: by pattern, the tensors to read, each whole (None) or (first, count) of its rows.
    """

    group: LoadGroup
    rows: tuple[int, int] | None
    sources: dict[str, list[tuple[HubTensor, tuple[int, int] | None]]]

    @staticmethod
    def of(group: LoadGroup, places: Mapping[str, Place]) -> Conversion:
        wanted = {(places[name].first, places[name].count) for name in group.targets}
        if group.method != "rows" or len(wanted) != 1:
            return Conversion(group, None, {pattern: [(t, None) for t in ts] for pattern, ts in group.sources.items()})
        rows = first, count = wanted.pop()
        shape = next(iter(group.targets.values()))
        sources: dict[str, list[tuple[HubTensor, tuple[int, int] | None]]] = {}
        for pattern, ts in group.sources.items():
            listed = len(ts) == shape[0] and len(ts[0].shape) == len(shape) - 1
            sources[pattern] = [(t, None) for t in ts[first : first + count]] if listed else [(ts[0], rows)]
        return Conversion(group, rows, sources)

    @property
    def size_bytes(self) -> int:
        chosen = [one for ones in self.sources.values() for one in ones]
        return sum(t.size_bytes if rows is None else t.size_bytes // t.shape[0] * rows[1] for t, rows in chosen)

    @property
    def first_byte(self) -> tuple[str, int]:
        return min((t.file, t.start) for ts in self.group.sources.values() for t in ts)

    def run(self, reader: Reader, places: Mapping[str, Place], plan: LoadPlan, model: nn.Module) -> None:
        group = self.group
        dtype = plan.dtypes.get(group.name) or plan.dtypes[next(iter(group.targets))]
        tensors = {p: [reader.tensor(t, rows).to(dtype) for t, rows in ones] for p, ones in self.sources.items()}
        converted = convert(group, tensors, AsPlanned(model, plan))
        for name in group.targets:
            place, value = places[name], converted[name]
            if self.rows is None and value.dim():
                value = value.narrow(0, place.first, place.count)
            place.local.copy_(_cast(value, (plan.dtypes[name], *place.casts)))


@dataclass(frozen=True)
class PackedRows:
    """Rows of a group with a packed weight: read dense, as any weight is, and packed at once.

    One row at a time, an expert's matrix, where the group's rows can be read by themselves; else all of this rank's.

    Attributes:
        at, count: the rows, from the first of this rank's on.
        pieces: their reads, planned on meta.
    """

    group: LoadGroup
    at: int
    count: int
    pieces: tuple[Copy | Conversion, ...]

    @staticmethod
    def of(group: LoadGroup, places: Mapping[str, Place], plan: LoadPlan) -> list[PackedRows]:
        own = {(places[name].first, places[name].count) for name in group.targets}
        assert len(own) == 1, f"{group.name}: one transform makes weights that are sharded differently"
        ((_, count),) = own
        at_once = count if group.method == "whole" else 1
        found = []
        for at in range(0, count, max(1, at_once)):
            some = {name: places[name].rows(at, at_once, torch.device("meta")) for name in group.targets}
            copies, conversions = _pieces_of(group, some, plan)
            found.append(PackedRows(group, at, at_once, (*copies, *conversions)))
        return found

    @property
    def converts(self) -> bool:
        return any(isinstance(piece, Conversion) for piece in self.pieces)

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.pieces)

    @property
    def first_byte(self) -> tuple[str, int]:
        return min(piece.first_byte for piece in self.pieces)

    def run(self, reader: Reader, places: Mapping[str, Place], plan: LoadPlan, model: nn.Module) -> None:
        dense = {name: places[name].rows(self.at, self.count) for name in self.group.targets}
        copies, conversions = _pieces_of(self.group, dense, plan)
        for copy in copies:
            copy.run(reader)
        for conversion in conversions:
            conversion.run(reader, dense, plan, model)
        for name, rows in dense.items():
            places[name].pack(self.at, rows.local)


class AsPlanned:
    """A model as a transform may ask for it: the parameters that were planned, whatever the model was edited into."""

    def __init__(self, model: nn.Module, plan: LoadPlan):
        self._model = model
        self._plan = plan
        self._shapes = plan.shapes

    def get_parameter(self, name: str) -> torch.Tensor:
        if name not in self._shapes:
            return self._model.get_parameter(name)
        return torch.empty(self._shapes[name], dtype=self._plan.dtypes[name], device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _threads() -> int:
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(4, (os.cpu_count() or 1) // local_world_size))


def _same_gpu(places: Mapping[str, Place]) -> Callable[[], None]:
    """For each reading thread: a new thread starts on GPU 0, and pinning memory there would open a context on it."""
    devices = {place.local.device for place in places.values() if place.local.device.type == "cuda"}
    return functools.partial(torch.cuda.set_device, devices.pop()) if devices else lambda: None
