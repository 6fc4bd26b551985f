"""The Hub format of a model, and the one adapter to transformers' weight conversion.

In memory an experts layer is `gate_up_proj[E, 2I, H]` and `down_proj[E, H, I]`; on the Hub most families
store one tensor per expert (`experts.0.w1.weight`, `experts.0.gate_proj.weight`), some a fused one under
another name. The transforms between the two are transformers' own (core_model_loading.py, semi-public);
nothing else in this package touches them, and nothing here knows a family by name.

The base model's safetensors headers are the authority on how a model looks on the Hub: they say which keys
exist, with which shape and dtype, in which file. `HubConverter` loads those headers into a meta model with
transformers' own loading code, so that it knows which transforms that base really uses (both format
generations of a family exist), and then plans, group by group, how parameters become Hub tensors:

    base headers ──load on meta──> the transforms that matched ──reverse, on meta──> groups: parameters → Hub
    keys

A group is the smallest set of parameters that must be converted together (`gate_up_proj` alone; q, k and v
where the base fuses them). Converting group by group bounds memory, and gives the same bytes as converting
the whole model.
"""

from __future__ import annotations

import json
import re
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel_moe.errors import HubFormatError
from accel_moe.weights.hub_config import model_class, read_config, untied_config

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# safetensors' dtype names; the order is the one its writer lays tensors out in (largest alignment first)
DTYPES: dict[str, torch.dtype] = {
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class HubTensor:
    """One tensor in Hub format. `dtype` is safetensors' name ("BF16"), `file` the safetensors file that has
    it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def size_bytes(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class ConversionGroup:
    """Parameters that are converted together, and the Hub tensors that they become: key → shape."""

    sources: tuple[str, ...]
    targets: dict[str, tuple[int, ...]]


# --- safetensors headers
# -----------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, and where its data starts under "__data_start__". Reads no
    tensor."""
    size_bytes = path.stat().st_size
    with open(path, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= size_bytes - 8:
            raise HubFormatError(
                f"{path} is not a safetensors file: its header says {length} bytes, the file has "
                f"{size_bytes}. Download "
                "it again (a Git LFS pointer looks like this too)."
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise HubFormatError(f"{path} has an unreadable safetensors header ({error}). Download it again.") from None
    header["__data_start__"] = 8 + length
    return header


def safetensors_files(folder: Path) -> list[str]:
    """The safetensors files that make up a model folder, in order: the index's, or the one file."""
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise HubFormatError(f"{index} is not a readable index ({type(error).__name__}: {error}).") from None
        return sorted(set(weight_map.values()))
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    found = sorted(p.name for p in folder.iterdir())[:5] if folder.is_dir() else []
    raise HubFormatError(
        f"{folder} is not a base model: expected {INDEX_NAME} or {SINGLE_NAME} in it, found "
        f"{', '.join(found) or 'nothing'}. "
        "Give the folder of the model that training started from, in safetensors format."
    )


def tensors_of_header(header: Mapping[str, Any], file: str) -> list[HubTensor]:
    return [
        HubTensor(key, value["dtype"], tuple(value["shape"]), file)
        for key, value in header.items()
        if not key.startswith("__")
    ]


def read_hub_tensors(folder: Path) -> dict[str, HubTensor]:
    """Key → HubTensor for every tensor in a model folder, from the headers alone. Raises HubFormatError."""
    tensors: dict[str, HubTensor] = {}
    for file in safetensors_files(folder):
        if not (folder / file).is_file():
            raise HubFormatError(f"{folder / file} is missing, and {INDEX_NAME} names it. Download the base again.")
        for tensor in tensors_of_header(read_header(folder / file), file):
            tensors[tensor.key] = tensor
    unknown = sorted({t.dtype for t in tensors.values()} - set(DTYPES))
    if unknown:
        raise HubFormatError(unknown_dtypes(str(folder), unknown))
    return tensors


def unknown_dtypes(name: str, dtypes: Sequence[str]) -> str:
    """The message for a base with tensors of dtypes that only quantised formats use (F8_E8M0, F4, …)."""
    return (
        f"{name} has tensors of dtype {', '.join(dtypes)}, expected one of {', '.join(DTYPES)}: it is quantised, and "
        "trained weights cannot be written so. Give a dequantised copy of the base."
    )


# --- transformers
# ------------------------------------------------------------------------------------------------


def meta_model(folder: Path, *, tied: bool = True, trust_remote_code: bool = False) -> Any:
    """The model that `folder`'s config describes, on meta: parameters have shapes and no memory.

    With `tied` false its word embeddings are not tied, whatever the config says (`untied_config`).

    Raises HubFormatError when there is no config, its architecture is not in this transformers, or it needs code of
    the folder's own that may not be run.
    """
    import transformers

    config = read_config(folder, trust_remote_code)
    if not tied:
        config = type(config).from_dict(untied_config(folder, trust_remote_code))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # fp32, whatever the config says: a tensor loaded into it keeps its bf16 or fp32 values
        if found := model_class(folder, config, trust_remote_code):
            return found._from_config(config, dtype=torch.float32)
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )


class HubConverter:
    """Converts one model's parameters to the Hub format of its base, group by group.

    Args:
        model: the model on meta (`meta_model`).
        base: the base's tensors (`read_hub_tensors`).
        additions: parameters whose tensors the base may lack, and that get one all the same.

    After construction `groups` covers every parameter and persistent buffer of the model, `base_only` are
    the base keys that no parameter becomes (MTP layers). What only repeats another parameter is in no
    group where the base leaves it out, as save_pretrained does.

    Raises HubFormatError when a parameter becomes a key that the base does not have, or another shape.
    """

    def __init__(self, model: Any, base: Mapping[str, HubTensor], additions: Iterable[str] = ()) -> None:
        self.model = model
        self._additions = set(additions)
        self.base = dict(base)
        self.dry_load = load_headers(model, base.values())
        self._state = dict(model.state_dict())
        self._aliases = tied_names(model)
        self.groups: list[ConversionGroup] = []
        self._plan()

    def _plan(self) -> None:
        produced: dict[str, tuple[str, ...]] = {}
        problems: list[str] = []
        for sources in _source_groups(self.model, self._state):
            converted = self._revert({name: self._state[name] for name in sources})
            targets = {key: tuple(tensor.shape) for key, tensor in converted.items()}
            absent = [key for key in targets if key not in self.base]
            if absent and not self._additions.issuperset(sources):
                if sources[0] in self._aliases and len(sources) == 1:
                    continue  # the base leaves the copy out, as save_pretrained does
                problems.append(f"{', '.join(sources)} becomes {absent[0]}, which the base does not have")
            for key, shape in targets.items():
                if key in self.base and shape != self.base[key].shape:
                    problems.append(f"{key}: the model has shape {shape}, the base {self.base[key].shape}")
                if key in produced:
                    problems.append(f"{key} comes from both {', '.join(produced[key])} and {', '.join(sources)}")
                produced[key] = sources
            self.groups.append(ConversionGroup(tuple(sources), targets))
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise HubFormatError(
                f"the base's tensors do not fit its own architecture: {'; '.join(problems[:3])}{more}. Is "
                f"this the model "
                "that training started from, and does this transformers know its format?"
            )
        self.base_only = sorted(set(self.base) - set(produced))

    def _revert(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        converted = revert_weight_conversion(self.model, state)
        return {self._with_base_prefix(key): tensor for key, tensor in converted.items()}

    def _with_base_prefix(self, key: str) -> str:
        """A base saved from the bare model lacks (or has) the `model.` that loading adds; reversal does not
        restore it."""
        if key in self.base:
            return key
        prefix = f"{self.model.base_model_prefix}."
        for other in (key.removeprefix(prefix), prefix + key):
            if other in self.base:
                return other
        return key

    def convert(self, group: ConversionGroup, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Hub key → tensor for one group. `tensors` has exactly the group's sources, whole, on one device.

        Values keep the dtype they came in. The results may be views of the inputs.
        """
        converted = self._revert({name: tensors[name] for name in group.sources})
        assert {k: tuple(t.shape) for k, t in converted.items()} == group.targets, group
        return converted

    def tied_aliases(self) -> dict[str, tuple[str, ...]]:
        """Parameter → the other names of the same tensor: any of them may be the one that was stored."""
        sets: dict[str, list[str]] = {}
        for name, other in self._aliases.items():
            sets.setdefault(other, [other]).append(name)
        return {name: tuple(n for n in names if n != name) for names in sets.values() for name in names}

    def load(self, group: ConversionGroup, hub: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The way back, through transformers' loading code: the group's parameters as from_pretrained would
        set them.

        `hub` has exactly the group's targets. Used to verify an export; `convert` is not involved.
        """
        load_headers(self.model, hub, tensors=hub, device="cpu", group=group.sources)
        loaded = {}
        for name in group.sources:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            loaded[name] = getattr(module, leaf).detach()
            if leaf in module._parameters:
                module._parameters[leaf] = torch.nn.Parameter(self._state[name], requires_grad=False)
            else:
                module._buffers[leaf] = self._state[name]
        return loaded


@dataclass(frozen=True)
class DryLoad:
    """What transformers reports after loading only headers: parameter names, and key names as it renamed
    them."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


def load_headers(
    model: Any,
    base: Iterable[HubTensor] | Mapping[str, torch.Tensor],
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    device: str = "meta",
    group: Sequence[str] | None = None,
) -> DryLoad:
    """Loads tensors of the base's shapes (or `tensors`) into the meta model with transformers' own loading
    code.

    A side effect is wanted: `model._weight_conversions` becomes the transforms that matched, which is what
    `revert_weight_conversion` reverses. With `group` the transforms of the whole base stay in force.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    if tensors is None:
        tensors = {t.key: torch.empty(t.shape, dtype=DTYPES[t.dtype], device="meta") for t in base}  # type: ignore
    kept = getattr(model, "_weight_conversions", None)
    config = LoadStateDictConfig(device_map={"": device}, weight_mapping=get_model_conversion_mapping(model))
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    if group is not None:
        model._weight_conversions = kept
    if info.conversion_errors:
        key, error = next(iter(info.conversion_errors.items()))
        raise HubFormatError(
            f"transformers could not convert the base's tensors for {key}: {str(error).splitlines()[-1]}"
        )
    tied = tied_names(model)
    missing = [n for n in info.missing_keys if tied.get(n) is None]
    mismatched = [
        f"{name}: {tuple(got)} in the file, {tuple(want)} in the model" for name, got, want in info.mismatched_keys
    ]
    return DryLoad(tuple(sorted(missing)), tuple(sorted(info.unexpected_keys)), tuple(sorted(mismatched)))


class _quiet:
    """No progress bar and no load report while only headers are loaded."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._was = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        if self._was:
            logging.enable_progress_bar()


def tied_names(model: Any) -> dict[str, str]:
    """Parameter name → the name it repeats, for weights that the model ties (lm_head.weight →
    embed_tokens.weight)."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return dict(tied) if isinstance(tied, dict) else {}


def _source_groups(model: Any, names: Iterable[str]) -> list[list[str]]:
    """Parameter names that the reversed transforms bring under one key, in the model's order."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    reverse = [transform.reverse_transform() for transform in reversed(model._weight_conversions or [])]
    renamings = [t for t in reverse if isinstance(t, WeightRenaming)]
    converters = [t for t in reverse if isinstance(t, WeightConverter)]
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, reverse=True)
        groups.setdefault((renamed, pattern is not None), []).append(name)
    return list(groups.values())


# --- writing safetensors
# -----------------------------------------------------------------------------------------


def shard_names(tensors: Sequence[tuple[str, int]], max_shard_bytes: int) -> dict[str, str]:
    """Key → file for tensors given as (key, size_bytes), in order: a new file when the next tensor would not
    fit."""
    shards: list[list[str]] = []
    filled = 0
    for key, size_bytes in tensors:
        if not shards or (filled and filled + size_bytes > max_shard_bytes):
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size_bytes
    if len(shards) <= 1:
        return {key: SINGLE_NAME for shard in shards for key in shard}
    total = len(shards)
    return {key: f"model-{i:05d}-of-{total:05d}.safetensors" for i, shard in enumerate(shards, 1) for key in shard}


def header_bytes(tensors: Sequence[HubTensor]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file that holds `tensors`, and each tensor's absolute offset in that file.

    The layout is the one safetensors' own writer chooses: by alignment, largest first, then by key.
    """
    order = list(DTYPES)
    laid_out = sorted(tensors, key=lambda t: (-DTYPES[t.dtype].itemsize, order.index(t.dtype), t.key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for tensor in laid_out:
        offsets[tensor.key] = position
        header[tensor.key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size_bytes],
        }
        position += tensor.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    prefix = struct.pack("<Q", len(text)) + text
    return prefix, {key: offset + len(prefix) for key, offset in offsets.items()}


def parse_size(text: str) -> int:
    """ "5GB" → 5_000_000_000, "300MiB" → 314_572_800; a plain number is bytes. Raises HubFormatError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise HubFormatError(f"{text!r} is not a size. Write it like 5GB, 300MB or 2GiB.")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
