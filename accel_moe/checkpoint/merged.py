"""A base and an adapter as one model: read parameter by parameter, like a checkpoint that was trained whole.

    base's files ──a group of them──> transformers' load ──> parameters ──the adapter's changes, in float32──> merged

So an adapter's checkpoint is exported by the same plan, writer and verification as any other. A parameter comes in
float32, and is rounded once, when it is written. Memory is that of one group of tensors and its copies.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from accel_moe.checkpoint.export_plan import converter_of
from accel_moe.checkpoint.manifest import TensorEntry
from accel_moe.checkpoint.opened import Checkpoint, TensorSource
from accel_moe.checkpoint.peft_folder import read_adapter_config
from accel_moe.errors import CheckpointError
from accel_moe.weights.adapter import (
    CONFIG_NAME,
    AdapterConfig,
    Changes,
    LowRankChange,
    is_adapter,
    plain_names,
    plan_changes,
    unmerged,
)
from accel_moe.weights.base_model import BaseModel, BaseTensors
from accel_moe.weights.fingerprint import digests, first_difference, other_base
from accel_moe.weights.transforms import ConversionGroup, HubConverter


def merged_onto(checkpoint: Checkpoint, base: BaseModel) -> Checkpoint:
    """The merged model, as a checkpoint, if `checkpoint` is of an adapter run or an adapter; else `checkpoint`.

    Raises CheckpointError when the adapter does not fit the base, or is none that can be merged; HubFormatError when
    the base is quantised.
    """
    if not is_adapter(checkpoint.reader.tensors):
        return checkpoint
    names = plain_names_of(checkpoint)
    fields = adapter_fields(checkpoint)
    config = AdapterConfig.read(fields, f"{checkpoint.name}/{CONFIG_NAME}")
    converter = converter_of(base, base.meta_model())
    changes = plan_changes(
        {plain: checkpoint.reader.tensors[stored].shape for plain, stored in names.items()},
        config,
        converter.model,
        {key: tensor.shape for key, tensor in base.tensors.items()},
    )
    if changes.problems:
        raise CheckpointError(unmerged(changes.problems, checkpoint.name, base.name))
    _check_base(checkpoint, base, config.base)
    reader = MergedModel(BaseTensors(base), converter, checkpoint.reader, names, changes)
    return replace(checkpoint, reader=reader, depends_on=(repr(fields), *base.stamps()))


def _check_base(checkpoint: Checkpoint, base: BaseModel, named: str | None) -> None:
    """Raises CheckpointError, with the first tensor that differs, when the base is not the one of the training run.

    Where nothing is known of that one but its name, the names are compared, and a note tells both.
    """
    entry = checkpoint.manifest.adapter if checkpoint.manifest is not None else None
    recorded = entry.base_tensors if entry is not None else {}
    if line := first_difference(recorded, digests(base, recorded)):
        raise CheckpointError(other_base(checkpoint.name, base.name, line))
    if not recorded and named and named != base.name:
        print(f"note: the adapter says that its base is {named}; {base.name} was given.", file=sys.stderr)


def adapter_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """The adapter_config.json of a checkpoint. Raises CheckpointError where there is none."""
    if checkpoint.manifest is not None and checkpoint.manifest.adapter is not None:
        return checkpoint.manifest.adapter.config
    for root in checkpoint.roots:
        if (found := read_adapter_config(root)) is not None:
            return found
    raise CheckpointError(
        f"{checkpoint.name} has an adapter's tensors and no {CONFIG_NAME}, which says how they are scaled. Put the one "
        "of the run into the folder: model.peft_config['default'].save_pretrained(FOLDER) in the training script."
    )


def plain_names_of(checkpoint: Checkpoint) -> dict[str, str]:
    """PEFT's name → stored name, for the adapter that the manifest means."""
    entry = checkpoint.manifest.adapter if checkpoint.manifest is not None else None
    return plain_names(checkpoint.reader.tensors, None if entry is None else entry.name)


class MergedModel:
    """A base with an adapter's changes, by the base's parameter names: a TensorSource.

    Args:
        names: PEFT's name of each of the adapter's tensors → its name in `adapter`.
    """

    def __init__(
        self,
        base: BaseTensors,
        converter: HubConverter,
        adapter: TensorSource,
        names: Mapping[str, str],
        changes: Changes,
    ) -> None:
        self.base, self.converter, self.adapter, self.names, self.changes = base, converter, adapter, names, changes
        self._groups = {name: group for group in converter.groups for name in group.sources}
        self._aliases = converter.tied_aliases()
        state = converter.model.state_dict()
        self.tensors: dict[str, TensorEntry] = {}
        changed = {*changes.added, *changes.replaced}
        for name, parameter in state.items():
            # a tied weight is one tensor, unless a change is made to one of its names alone
            tied = name not in self._groups and not changed & {name, *self._aliases.get(name, ())}
            if not tied:
                shape = adapter.tensors[names[changes.replaced[name]]].shape if name in changes.replaced else None
                self.tensors[name] = TensorEntry(shape or tuple(parameter.shape), _kind(parameter), ())
        self._loaded: dict[str, torch.Tensor] = {}

    def check(self) -> list[str]:
        return self.adapter.check()

    def missing_files(self) -> list[str]:
        return self.adapter.missing_files()

    def size_bytes(self, name: str) -> int:
        return 4 * torch.Size(self.tensors[name].shape).numel()

    def read(self, name: str, memory: torch.Tensor | None = None) -> torch.Tensor:
        """The merged parameter, float32 where it is a floating one."""
        if name in self.changes.replaced:
            value = self._factor(self.changes.replaced[name])
        else:
            value = self._of_base(name)
        for change in self.changes.added.get(name, ()):
            value = value.float()
            self._add(change, value)
        return value

    def _of_base(self, name: str) -> torch.Tensor:
        """The parameter as the base has it. The other parameters of its group are kept until they are read."""
        if name not in self._groups:
            name = next(alias for alias in self._aliases[name] if alias in self._groups)
        if name not in self._loaded:
            self._loaded = self._load(self._groups[name])
        return self._loaded.pop(name)

    def _load(self, group: ConversionGroup) -> dict[str, torch.Tensor]:
        hub = {key: self.base.read(key) for key in group.targets}
        for key in hub:
            for change in self.changes.in_files.get(key, ()):
                hub[key] = hub[key].float()
                self._add(change, hub[key])
        return self.converter.load(group, hub)

    def _add(self, change: LowRankChange, weight: torch.Tensor) -> None:
        change.add_to(weight, self._factor(change.a), self._factor(change.b))

    def _factor(self, name: str) -> torch.Tensor:
        """A tensor of the adapter, by PEFT's name."""
        return self.adapter.read(self.names[name])


def refuse_nan(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for NaN or infinity in the adapter of a merged model: reads all of the adapter."""
    if isinstance(merged := checkpoint.reader, MergedModel):
        for name, stored in merged.names.items():
            if not torch.isfinite(merged.adapter.read(stored)).all():
                raise CheckpointError(
                    f"{name} of {checkpoint.name} has NaN or infinity, expected finite values. Use an earlier one."
                )


def _kind(parameter: torch.Tensor) -> str:
    return str(parameter.dtype).removeprefix("torch.")
