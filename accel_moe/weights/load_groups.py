"""Groups of stored tensors that become parameters together, and how a rank may read its rows of them.

All of it comes from the safetensors headers and transformers' own transforms (transforms.py), without a table of
families. `load_groups` matches key by key over the whole checkpoint: a part of the keys would number the experts
wrongly.

May a rank convert only its own rows? FSDP and ep shard dim 0. A transform may be fed a rank's rows if it commutes with
taking rows: stacking experts does, cutting a fused qkv on dim 0 does not. No list of transforms says so. `road_of` asks
the transform itself, on small random tensors: whole, then a few rows. A transform that needs the model or its config to
convert cannot be asked so, and gets whole tensors.

transformers' own shard-on-read (DtensorShardOperation, 5.17 and 5.23) slices every source by its target's dim 0,
whatever the transform; it fails on a rank whose shard is empty; and it casts a file in one step to the parameter's
dtype, which under mixed precision is already fp32. So its transforms are used here, and its slicing is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from accel_moe.weights.safetensors import HubTensor
from accel_moe.weights.transforms import match_keys, on_meta, run_converter

ROWS = 4
"""Rows of the small tensors that a transform is tried on; the middle two are the part."""


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
    sources: dict[str, tuple[HubTensor, ...]]
    converter: Any
    road: str = "whole"

    def of(self, wanted: Callable[[str], bool]) -> LoadGroup:
        """The group with only the wanted targets."""
        return replace(self, targets={name: shape for name, shape in self.targets.items() if wanted(name)})


def load_groups(model: Any, stored: Mapping[str, HubTensor], weight_mapping: Sequence[Any]) -> list[LoadGroup]:
    """The checkpoint's tensors in groups, each with the parameters or buffers of `model` that it becomes.

    Keys that match nothing (unexpected) are left out.
    """
    collected: dict[str, tuple[Any, dict[str, list[HubTensor]]]] = {}
    for key, name, pattern, converter in match_keys(model, stored, weight_mapping):
        _, sources = collected.setdefault(name, (converter, {}))
        sources.setdefault(pattern, []).append(stored[key])
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    roads: dict[Any, str] = {}
    groups = []
    for name, (converter, sources) in collected.items():
        order = sources if converter is None else [p for p in converter.source_patterns if p in sources]
        group = LoadGroup(name, {}, {pattern: tuple(sources[pattern]) for pattern in order}, converter)
        groups.append(_with_targets(group, model, shapes, roads))
    return groups


def _with_targets(
    group: LoadGroup, model: Any, shapes: Mapping[str, tuple[int, ...]], roads: dict[Any, str]
) -> LoadGroup:
    if group.converter is None:
        tensors = next(iter(group.sources.values()))
        same = len(tensors) == 1 and tensors[0].shape == shapes[group.name]
        return replace(group, targets={group.name: shapes[group.name]}, road="copy" if same else "whole")
    meta = {pattern: [*on_meta(tensors).values()] for pattern, tensors in group.sources.items()}
    group = replace(group, targets={key: shapes[key] for key in convert(group, meta, model) if key in shapes})
    return replace(group, road=road_of(group, roads))


def convert(group: LoadGroup, tensors: Mapping[str, list[torch.Tensor]], model: Any) -> dict[str, torch.Tensor]:
    """Parameter → tensor: the group's transform on tensors by source pattern. The results may be views of the inputs.

    `model` is None where the transform must do without.
    """
    if group.converter is None:
        return {group.name: next(iter(tensors.values()))[0]}
    return run_converter(group.converter, group.name, tensors, model)


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
