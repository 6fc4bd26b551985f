"""The plan of an export: which parameters become which tensors of which file, from shapes alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from accel_moe.checkpoint.opened import Checkpoint, TensorSource
from accel_moe.errors import CheckpointError, HubFormatError, first_few
from accel_moe.weights.base_model import BaseModel
from accel_moe.weights.quantised import refuse_quantised_tensors, refuse_scaled_tensors
from accel_moe.weights.safetensors import DTYPE_NAMES, HubTensor, shard_names
from accel_moe.weights.transforms import ConversionGroup, HubConverter, tied_names


@dataclass(frozen=True)
class ExportPlan:
    """The place of every tensor of the result.

    Attributes:
        outputs: the result's tensors by key.
        extras: the base keys that no parameter becomes.
        aliases: for a tied parameter, the other names that it may be stored under.
        untied: parameters that the base ties and training did not; they get tensors of their own.
        config: the result's config.json if something was untied, else None.
    """

    checkpoint: Checkpoint
    base: BaseModel
    converter: HubConverter
    groups: tuple[ConversionGroup, ...]
    outputs: dict[str, HubTensor]
    extras: tuple[str, ...]
    keep_extra: bool
    aliases: dict[str, tuple[str, ...]]
    untied: tuple[str, ...]
    config: dict[str, Any] | None
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
        """Equal for two exports whose results would be equal: only then may one go on where the other stopped."""
        manifest = self.checkpoint.manifest
        source = manifest.to_json() if manifest is not None else _stat_of(self.checkpoint)
        target = sorted((t.key, t.dtype, t.shape, t.file) for t in self.outputs.values())
        identity = [source, target, self.base.name, *self.checkpoint.depends_on]
        return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()


def _stat_of(checkpoint: Checkpoint) -> list[Any]:
    """Names, sizes and times of a stock checkpoint's files, to recognise it by."""
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
    """Plans the whole export, from shapes alone but for tied tensors that the checkpoint has twice: those are read.

    `dtype` replaces the base's main floating dtype (the one of most of its bytes). Tensors that the base keeps in
    another one, such as fp32 router biases in a bf16 model, stay as they are. `max_shard_bytes` replaces the base's
    file layout.

    Raises CheckpointError when the checkpoint is of another model, HubFormatError when the base is quantised.
    """
    model = base.meta_model()
    converter = converter_of(base, model)
    _match_checkpoint(checkpoint, converter, base)
    aliases = converter.tied_aliases()
    untied = _trained_apart(checkpoint.reader, aliases)
    if untied:
        model = base.meta_model(tied=False)
        converter = _untied_converter(checkpoint, base, model, aliases, untied)
    groups = converter.groups
    outputs = {key: base.tensors[key] for group in groups for key in group.targets if key in base.tensors}
    outputs |= _additions(converter, base, aliases)
    if keep_extra:
        outputs |= {key: base.tensors[key] for key in converter.base_only}
    if dtype is not None:
        main = main_dtype(base.tensors.values())
        name = DTYPE_NAMES[dtype]
        extras = set(converter.base_only)
        outputs = {k: replace(t, dtype=name) if t.dtype == main and k not in extras else t for k, t in outputs.items()}
    in_order = [key for key in base.tensors if key in outputs] + [key for key in outputs if key not in base.tensors]
    if max_shard_bytes is not None:
        files = shard_names([(key, outputs[key].size_bytes) for key in in_order], max_shard_bytes)
        outputs = {key: replace(outputs[key], file=files[key]) for key in in_order}
    return ExportPlan(
        checkpoint=checkpoint,
        base=base,
        converter=converter,
        groups=tuple(groups),
        outputs={key: outputs[key] for key in in_order},
        extras=tuple(converter.base_only),
        keep_extra=keep_extra,
        aliases=aliases,
        untied=tuple(untied),
        config=base.untied_config() if untied else None,
        total_parameters=model.num_parameters(),
    )


def converter_of(base: BaseModel, model: Any, additions: Iterable[str] = ()) -> HubConverter:
    """The base's converter. Raises HubFormatError when a trained tensor would be written in a quantised dtype."""
    try:
        converter = HubConverter(model, base.tensors, additions)
    except HubFormatError:
        refuse_scaled_tensors(base.tensors, base.name)  # if it has some, then that is why it does not fit
        raise
    state = model.state_dict()
    trained = {
        key: any(state[name].is_floating_point() for name in group.sources)
        for group in converter.groups
        for key in group.targets
    }
    refuse_quantised_tensors(base.tensors, trained, base.name)
    return converter


def _trained_apart(reader: TensorSource, aliases: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Parameters that the base ties to another one, and that the checkpoint has with values of their own.

    A checkpoint of a tied model may have one tensor under both names: only its bytes tell.
    """
    pairs = {frozenset((name, other)) for name, others in aliases.items() for other in others}
    stored = [sorted(pair) for pair in pairs if all(name in reader.tensors for name in pair)]
    apart = {name for one, two in stored if not _same_values(reader, one, two) for name in (one, two)}
    return sorted(apart)


def _same_values(reader: TensorSource, name: str, other: str) -> bool:
    one, two = reader.tensors[name], reader.tensors[other]
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    bytes_of = [reader.read(n).reshape(-1).view(torch.uint8) for n in (name, other)]
    return torch.equal(*bytes_of)  # of bytes: a NaN equals itself


def _untied_converter(
    checkpoint: Checkpoint, base: BaseModel, model: Any, aliases: Mapping[str, tuple[str, ...]], untied: Iterable[str]
) -> HubConverter:
    """The converter to a result that has tensors of its own for what training untied.

    Raises CheckpointError when the architecture ties them whatever its config says.
    """
    if still := sorted(set(untied) & set(tied_names(model))):
        raise CheckpointError(
            f"{checkpoint.name} has {still[0]} with other values than {aliases[still[0]][0]}, and {base.name} ties the "
            "two even with tie_word_embeddings=False: no config loads what was trained. Tie them in training, too, or "
            "give a base whose code keeps them apart."
        )
    return converter_of(base, model, additions=aliases)


def _additions(
    converter: HubConverter, base: BaseModel, aliases: Mapping[str, tuple[str, ...]]
) -> dict[str, HubTensor]:
    """Tensors that the base does not have, each in the dtype and file of the tensor that it was tied to."""
    key_of = {name: key for group in converter.groups for name in group.sources for key in group.targets}
    added = {}
    for group in converter.groups:
        for key, shape in group.targets.items():
            if key not in base.tensors:
                twin = next(base.tensors[key_of[n]] for n in aliases[group.sources[0]] if key_of[n] in base.tensors)
                added[key] = HubTensor(key, twin.dtype, shape, twin.file)
    return added


def main_dtype(tensors: Iterable[HubTensor]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if tensor.torch_dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "F32"


def _refuse_packed(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a checkpoint that holds quantised experts themselves."""
    how = None if checkpoint.manifest is None else checkpoint.manifest.quantised_experts
    packed = [name for name, entry in checkpoint.reader.tensors.items() if entry.dtype == "uint8" and "expert" in name]
    if how is not None and packed:
        raise CheckpointError(
            f"{checkpoint.name} holds experts in {how.scheme} ({len(packed)} tensors such as {packed[0]}), which the "
            "Hub's format has no place for, and whose dense values are the base's own: they were frozen. Train "
            "adapters (peft.get_peft_model) on quantised experts."
        )


def _match_checkpoint(checkpoint: Checkpoint, converter: HubConverter, base: BaseModel) -> None:
    """Raises CheckpointError, with the way out, when the checkpoint's tensors are not those of the base's model."""
    stored = checkpoint.reader.tensors
    _refuse_packed(checkpoint)
    shapes = {name: tuple(tensor.shape) for name, tensor in converter.model.state_dict().items()}
    aliases = converter.tied_aliases()
    problems = []
    resized = []
    for name in shapes:
        entry = next((stored[n] for n in (name, *aliases.get(name, ())) if n in stored), None)
        if entry is None:
            problems.append(f"{name} is in the base and not in the checkpoint")
        elif entry.shape != shapes[name]:
            problems.append(f"{name} has shape {entry.shape} in the checkpoint, {shapes[name]} in the base")
            resized.append((name, entry.shape, shapes[name]))
    problems += [f"{name} is in the checkpoint and not in the base" for name in stored if name not in shapes]
    if not problems:
        return
    rows = _rows_of_resized(converter.model, resized) if len(resized) == len(problems) else None
    fix = (
        f"The embeddings were resized to {rows} rows in training, and the result is written after the base: resize the "
        f"base, too, by model = AutoModelForCausalLM.from_pretrained({base.name!r}), "
        f"model.resize_token_embeddings({rows}), model.save_pretrained(RESIZED), save the tokenizer of the training "
        "script into the same folder, and give RESIZED as the base."
        if rows is not None
        else "Give the base that training started from. If this is it, the training script changed the model (another "
        "head, layers, biases): build the model as the script does, model.save_pretrained(CHANGED), the tokenizer too, "
        "and give CHANGED as the base; its values do not matter."
    )
    raise CheckpointError(f"{checkpoint.name} is not a checkpoint of {base.name}: {first_few(problems)}. {fix}")


def _rows_of_resized(model: Any, differing: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> int | None:
    """The rows of the checkpoint's embeddings, when they and what is tied to their size are all that differs."""
    embeddings = {"", *(n for n, module in model.named_modules() if module is model.get_input_embeddings())}
    rows = {(name.rpartition(".")[0], ours[0]) for name, ours, theirs in differing if ours[1:] == theirs[1:]}
    if not any(owner in embeddings for owner, _ in rows) or len({count for _, count in rows}) != 1:
        return None
    return next(iter(rows))[1]


def stored_name(plan: ExportPlan, name: str) -> str:
    """The name that a parameter is stored under; a tied one may have been stored once, under another of its names."""
    return next(n for n in (name, *plan.aliases.get(name, ())) if n in plan.checkpoint.reader.tensors)
