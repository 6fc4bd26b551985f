"""What loading needs of transformers' weight conversion: which stored tensors become which parameters, and how.

Companion of transforms.py, which goes the other way. Three questions are answered here, all from the safetensors
headers and transformers' own transforms, without a table of families:

1. *Which stored tensors become which parameters?* `load_groups` asks transformers' renaming, key by key over the
   whole checkpoint (a part of the keys would number the experts wrongly), as its own loop does.
2. *Would transformers load it?* `plan_load` runs its real loading function with meta tensors in place of the file's:
   missing, unexpected and mismatched keys, and every parameter's final dtype, are then its own answers.
3. *May a rank convert its own rows only?* FSDP and ep shard dim 0. A transform may be fed a rank's rows if it
   commutes with taking rows: stacking experts does, cutting a fused qkv on dim 0 does not. Instead of a list of
   transforms that we believe in, `road_of` asks the transform itself, on small random tensors: whole, then a few
   rows. One that needs the model or its config to convert cannot be asked so, and gets whole tensors.

transformers' own shard-on-read (DtensorShardOperation, 5.17 and 5.23) slices every source by its target's dim 0,
whatever the transform; it fails on a rank whose shard is empty; and it casts a file in one step to the parameter's
dtype, which under mixed precision is already fp32. So its transforms are used here, and its slicing is not.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from accel_moe.errors import HubFormatError
from accel_moe.weights.transforms import DTYPES, _quiet, read_header

ROWS = 4
"""Rows of the small tensors that a transform is tried on; the middle two are the part."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: `start` is the byte in `file` where its values begin, row-major."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    start: int

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class LoadGroup:
    """Stored tensors that are converted together, and the parameters that they become.

    Attributes:
        name: the parameter that transformers files the group under; its dtype is the one that sources are read in.
        targets: the parameters, {name: shape}.
        sources: {source pattern: its tensors in order}, patterns in the transform's order.
        converter: transformers' WeightConverter, or None where a tensor is only renamed.
        road: how a rank reads its rows of the targets.
            "copy": they are the same rows of the one source.
            "stack": row i is the i-th source, or the i-th of each pattern one after the other on the next dim.
            "rows": converting the rows' sources gives the rows.
            "whole": every source is needed whole.
    """

    name: str
    targets: dict[str, tuple[int, ...]]
    sources: dict[str, tuple[StoredTensor, ...]]
    converter: Any
    road: str = "whole"


def stored_tensors(files: Sequence[str]) -> dict[str, StoredTensor]:
    """Every tensor of the safetensors `files`, from their headers. No tensor is read.

    Raises:
        HubFormatError: a file is missing, is shorter than its header says, or has a dtype that torch cannot hold.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not os.path.isfile(file):
            raise HubFormatError(f"{file} is missing, and the checkpoint's index names it. Download it again.")
        header = read_header(Path(file))
        data = header["__data_start__"]
        end = data
        for key, entry in header.items():
            if key.startswith("__"):
                continue
            if entry["dtype"] not in DTYPES:
                raise HubFormatError(f"{file}: {key} has dtype {entry['dtype']}, which torch cannot hold.")
            start, stop = entry["data_offsets"]
            tensor = StoredTensor(key, tuple(entry["shape"]), DTYPES[entry["dtype"]], str(file), data + start)
            if tensor.size_bytes != stop - start:
                raise HubFormatError(
                    f"{file}: the header gives {key} {stop - start} bytes, its shape needs {tensor.size_bytes}. "
                    "Download it again."
                )
            tensors[key] = tensor
            end = max(end, data + stop)
        if (size_bytes := os.path.getsize(file)) < end:
            raise HubFormatError(
                f"{file} is truncated: {size_bytes} bytes, and its header says {end}. Download it again."
            )
    return tensors


def plan_load(
    original: Callable[..., Any], model: Any, stored: Mapping[str, StoredTensor], load_config: Any
) -> tuple[Any, Any]:
    """transformers' `_load_pretrained_model` with meta tensors of the stored shapes and dtypes.

    Every parameter that the checkpoint has ends on meta with its final dtype, and marked as initialised; what it
    returns is what transformers reports (missing, unexpected, mismatched).
    """
    tensors = {t.key: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in stored.values()}
    with _quiet():
        return original(model, tensors, None, replace(load_config, device_map={"": torch.device("meta")}))


def load_groups(model: Any, stored: Mapping[str, StoredTensor], weight_mapping: Sequence[Any]) -> list[LoadGroup]:
    """The checkpoint's tensors in groups, each with the parameters or buffers of `model` that it becomes.

    Keys that match nothing (unexpected) are left out. The same steps as transformers'
    `convert_and_load_state_dict_in_model`, without the tensors.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    renamings = [t for t in weight_mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in weight_mapping if isinstance(t, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    collected: dict[str, tuple[Any, dict[str, list[StoredTensor]]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if name not in state:
            continue
        converter = None if pattern is None else of_pattern[pattern]
        _, sources = collected.setdefault(name, (converter, {}))
        sources.setdefault(pattern or key, []).append(stored[key])
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    roads: dict[Any, str] = {}
    return [_group(model, shapes, name, *found, roads) for name, found in collected.items()]


def _group(
    model: Any,
    shapes: dict[str, tuple[int, ...]],
    name: str,
    converter: Any,
    sources: dict[str, list[StoredTensor]],
    roads: dict[Any, str],
) -> LoadGroup:
    if converter is None:
        tensors = next(iter(sources.values()))
        frozen = {pattern: tuple(ts) for pattern, ts in sources.items()}
        same = len(tensors) == 1 and tensors[0].shape == shapes[name]
        return LoadGroup(name, {name: shapes[name]}, frozen, None, "copy" if same else "whole")
    order = [p for p in converter.source_patterns if p in sources]
    frozen = {pattern: tuple(sources[pattern]) for pattern in order}
    group = LoadGroup(name, {}, frozen, converter)
    meta = {p: [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in ts] for p, ts in frozen.items()}
    targets = {key: shapes[key] for key in convert(group, meta, model) if key in shapes}
    group = replace(group, targets=targets)
    return replace(group, road=road_of(group, roads))


def convert(group: LoadGroup, tensors: Mapping[str, list[torch.Tensor]], model: Any) -> dict[str, torch.Tensor]:
    """Parameter name → tensor: transformers' own transform of a group on the given tensors.

    The results may be views of the inputs.
    """
    if group.converter is None:
        return {group.name: next(iter(tensors.values()))[0]}
    converter = copy.deepcopy(group.converter)
    for pattern, values in tensors.items():
        converter.collected_tensors[pattern] = list(values)
    config = None if model is None else model.config
    converted = converter.convert(group.name, model=model, config=config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def road_of(group: LoadGroup, known: dict[Any, str] | None = None) -> str:
    """How a rank may read its rows of a converted group's targets; see `LoadGroup.road`. Pure.

    `known` remembers the answer for groups that differ only in their layer.
    """
    rows = {shape[0] if shape else None for shape in group.targets.values()}
    if len(rows) != 1 or None in rows:
        return "whole"
    (count,) = rows
    dims = {len(shape) for shape in group.targets.values()}
    sources = list(group.sources.values())
    listed = all(len(ts) == count and all(len(t.shape) + 1 in dims for t in ts) for ts in sources)
    stacked = all(len(ts) == 1 and ts[0].shape[:1] == (count,) for ts in sources)
    alike = all(t.shape == ts[0].shape for ts in sources for t in ts)
    if len(dims) != 1 or not (listed or stacked) or not alike:
        return "whole"
    key = (id(group.converter), listed, dims.pop(), len(group.targets), tuple(group.sources))
    known = {} if known is None else known
    if key not in known:
        known[key] = _try_rows(group, listed)
    return known[key]


def _try_rows(group: LoadGroup, listed: bool) -> str:
    generator = torch.Generator().manual_seed(0)
    sizes = (12, 20, 28, 36, 44)  # of the dims behind the rows: even, and no two alike
    whole: dict[str, list[torch.Tensor]] = {}
    for pattern, ts in group.sources.items():
        behind = sizes[: len(ts[0].shape) - (not listed)]
        values = torch.randint(0, 2**30, (ROWS, *behind), generator=generator)
        whole[pattern] = list(values) if listed else [values]
    part = {p: ts[1:3] if listed else [ts[0][1:3]] for p, ts in whole.items()}
    try:
        expected = convert(group, {p: list(ts) for p, ts in whole.items()}, None)
        found = convert(group, part, None)
    except Exception:  # the transform needs the model, its config, or other sizes: it cannot be asked
        return "whole"
    if len(expected) != len(group.targets) or expected.keys() != found.keys():
        return "whole"
    if not all(v.shape[0] == ROWS and torch.equal(v[1:3], found[name]) for name, v in expected.items()):
        return "whole"
    if listed and len(expected) == 1:
        (result,) = expected.values()
        per_row = [[whole[p][i] for p in group.sources] for i in range(ROWS)]
        straight = torch.stack([torch.cat(row) if row[0].dim() else torch.stack(row) for row in per_row])
        if torch.equal(straight.reshape(-1), result.reshape(-1)) and straight.shape == result.shape:
            return "stack"
    return "rows"
