"""The plan of an export: which parameters become which tensors of which file, from shapes alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from accel_moe.checkpoint.base_model import BaseModel
from accel_moe.checkpoint.dcp import TensorReader
from accel_moe.checkpoint.export import Checkpoint
from accel_moe.checkpoint.manifest import CheckpointError
from accel_moe.hub_format import DTYPE_NAMES, DTYPES, ConversionGroup, HubConverter, HubTensor, shard_names


@dataclass(frozen=True)
class ExportPlan:
    """What goes where. `outputs` are the result's tensors by key, `extras` the base keys that no parameter
    becomes.

    `tied` maps a parameter that is left out to the one that it repeats.
    """

    checkpoint: Checkpoint
    base: BaseModel
    converter: HubConverter
    groups: tuple[ConversionGroup, ...]
    outputs: dict[str, HubTensor]
    extras: tuple[str, ...]
    keep_extra: bool
    tied: dict[str, str]
    total_parameters: int

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.outputs.values())

    def group_bytes(self, group: ConversionGroup) -> int:
        return sum(self.outputs[key].size_bytes for key in group.targets)

    def files(self) -> dict[str, list[HubTensor]]:
        files: dict[str, list[HubTensor]] = {}
        for tensor in self.outputs.values():
            files.setdefault(tensor.file, []).append(tensor)
        return dict(sorted(files.items()))

    def fingerprint(self) -> str:
        """Equal for two exports whose results would be equal: an interrupted one may only be resumed by such
        a one."""
        manifest = self.checkpoint.manifest
        source = manifest.to_json() if manifest is not None else _stat_of(self.checkpoint)
        target = sorted((t.key, t.dtype, t.shape, t.file) for t in self.outputs.values())
        return hashlib.blake2b(json.dumps([source, target, self.base.name]).encode(), digest_size=16).hexdigest()


def _stat_of(checkpoint: Checkpoint) -> list[Any]:
    """Names, sizes and times of a stock checkpoint's files: what is left to recognise it by."""
    return sorted(
        [str(path), path.stat().st_size, path.stat().st_mtime_ns]
        for root in checkpoint.roots
        for path in (root / checkpoint.dcp_folder).glob("*")
    )


def plan_export(
    checkpoint: Checkpoint,
    base: BaseModel,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    keep_extra: bool = False,
) -> ExportPlan:
    """Plans the whole export from shapes alone. Raises CheckpointError when the checkpoint is of another
    model.

    `dtype` replaces the base's main floating dtype (the one of most of its bytes); tensors that the base
    keeps in another one, such as fp32 router biases in a bf16 model, stay as they are. `max_shard_bytes`
    replaces the base's file layout.
    """
    model = base.meta_model()
    converter = HubConverter(model, base.tensors)
    total_parameters = model.num_parameters()
    groups = _match_checkpoint(checkpoint, converter, base)
    outputs = {key: base.tensors[key] for group in groups for key in group.targets}
    if keep_extra:
        outputs |= {key: base.tensors[key] for key in converter.base_only}
    if dtype is not None:
        main = main_dtype(base.tensors.values())
        name = DTYPE_NAMES[dtype]
        extras = set(converter.base_only)
        outputs = {k: replace(t, dtype=name) if t.dtype == main and k not in extras else t for k, t in outputs.items()}
    in_base_order = [key for key in base.tensors if key in outputs]
    if max_shard_bytes is not None:
        files = shard_names([(key, outputs[key].size_bytes) for key in in_base_order], max_shard_bytes)
        outputs = {key: replace(outputs[key], file=files[key]) for key in in_base_order}
    return ExportPlan(
        checkpoint=checkpoint,
        base=base,
        converter=converter,
        groups=tuple(groups),
        outputs={key: outputs[key] for key in in_base_order},
        extras=tuple(converter.base_only),
        keep_extra=keep_extra,
        tied=converter.tied,
        total_parameters=total_parameters,
    )


def main_dtype(tensors: Iterable[HubTensor]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if DTYPES[tensor.dtype].is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "F32"


def _refuse_adapters(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Raises CheckpointError, with the way to a merged model, for the checkpoint of a PEFT run."""
    adapters = [name for name in checkpoint.reader.tensors if "lora_" in name or name.startswith("base_model.model.")]
    if adapters:
        raise CheckpointError(
            f"{checkpoint.name} is of a PEFT run ({len(adapters)} tensors such as {adapters[0]}), and consolidate does "
            "not merge adapters. After load_state in the training script, gather the adapter on every rank, "
            "{n: t.full_tensor() for n, t in model.state_dict().items() if 'lora_' in n}, and save it on the main "
            "process with accelerator.unwrap_model(model).save_pretrained(ADAPTER, state_dict=...); then merge it "
            f"offline: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base.name!r}), ADAPTER)"
            ".merge_and_unload().save_pretrained(OUT)."
        )


def _match_checkpoint(checkpoint: Checkpoint, converter: HubConverter, base: BaseModel) -> list[ConversionGroup]:
    """The converter's groups with sources that the checkpoint has, tied weights resolved. Raises
    CheckpointError."""
    stored = checkpoint.reader.tensors
    _refuse_adapters(checkpoint, base)
    shapes = {name: tuple(tensor.shape) for name, tensor in converter.model.state_dict().items()}
    aliases = converter.tied_aliases()
    problems = []
    for name in shapes:
        entry = stored.get(name) or stored.get(aliases.get(name, ""))
        if entry is None:
            problems.append(f"{name} is in the base and not in the checkpoint")
        elif entry.shape != shapes[name]:
            problems.append(f"{name} has shape {entry.shape} in the checkpoint, {shapes[name]} in the base")
    problems += [f"{name} is in the checkpoint and not in the base" for name in stored if name not in shapes]
    if problems:
        raise CheckpointError(
            f"{checkpoint.name} is not a checkpoint of {base.name}: {'; '.join(problems[:3])}"
            f"{f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''}. Give the base that "
            f"training started from."
        )
    return converter.groups


def stored_name(reader: TensorReader, name: str, aliases: Mapping[str, str]) -> str:
    """The name that a parameter is stored under; a tied one may have been stored once, under its other name."""
    return name if name in reader.tensors else aliases[name]
