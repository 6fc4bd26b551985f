"""The adapter to transformers' weight conversion: parameters to Hub tensors, and Hub tensors to parameters.

In memory an experts layer is `gate_up_proj[E, 2I, H]` and `down_proj[E, H, I]`. On the Hub most families store one
tensor per expert (`experts.0.w1.weight`, `experts.0.gate_proj.weight`), some a fused one under another name. The
transforms between the two are transformers' own (core_model_loading.py, semi-public). Nothing else in this package
touches them, and nothing here knows a family by name.

Loading takes `dry_load` (would transformers load these files?), `match_keys` (which tensor becomes which parameter?)
and `run_converter`; load_groups.py puts them together.

Export takes `HubConverter`. The base model's safetensors headers say how the model looks on the Hub: which keys exist,
with which shape and dtype, in which file. The converter loads these headers into a model on meta with transformers' own
loading code, so that it knows which transforms this base uses (both format generations of a family exist). Then it
plans, group by group, how parameters become Hub tensors:

    base headers ──load on meta──> the transforms that matched ──reverse, on meta──> groups: parameters → Hub keys

A group is the smallest set of parameters that must be converted together (`gate_up_proj`; or q, k and v where the base
fuses them). Converting group by group bounds memory, and gives the same bytes as converting the whole model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from accel_moe.errors import HubFormatError, first_few
from accel_moe.weights.safetensors import HubTensor

_META = torch.device("meta")

# --- Hub tensors to parameters


def dry_load(
    original: Callable[..., Any], model: Any, stored: Mapping[str, HubTensor], load_config: Any
) -> tuple[Any, Any]:
    """Run transformers' `_load_pretrained_model` (`original`) with meta tensors of the stored shapes and dtypes.

    Every parameter that the checkpoint has ends on meta with its final dtype, marked as initialised. Returns the pair
    that transformers returns: its report of missing, unexpected and mismatched keys, and its offload index.
    """
    with _quiet():
        return original(model, on_meta(stored.values()), None, replace(load_config, device_map={"": _META}))


def on_meta(tensors: Iterable[HubTensor]) -> dict[str, torch.Tensor]:
    """Key → a tensor on meta of the stored shape and dtype."""
    return {t.key: torch.empty(t.shape, dtype=t.torch_dtype, device=_META) for t in tensors}


def match_keys(model: Any, keys: Iterable[str], weight_mapping: Sequence[Any]) -> Iterator[tuple[str, str, str, Any]]:
    """(key, parameter, pattern, converter) for each key of a checkpoint that `model` has a use for.

    The steps are those of transformers' `convert_and_load_state_dict_in_model`. `parameter` is the name under which it
    collects the sources of one conversion. A tensor that is only renamed has its key as pattern, and no converter.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    renamings = [t for t in weight_mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in weight_mapping if isinstance(t, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if name in state:
            yield key, name, pattern or key, None if pattern is None else of_pattern[pattern]


def run_converter(
    converter: Any, name: str, tensors: Mapping[str, list[torch.Tensor]], model: Any
) -> dict[str, torch.Tensor]:
    """Parameter → tensor: one of transformers' conversions, on {source pattern: tensors}. The results may be views."""
    converter = copy.deepcopy(converter)
    for pattern, values in tensors.items():
        converter.collected_tensors[pattern] = list(values)
    converted = converter.convert(name, model=model, config=None if model is None else model.config)
    return {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}


@dataclass(frozen=True)
class LoadingReport:
    """What transformers reports after a load: parameter names, and key names as it renamed them."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


def load_tensors(model: Any, tensors: Mapping[str, torch.Tensor], device: str) -> LoadingReport:
    """Load Hub tensors into a model on meta with transformers' own loading code.

    A side effect is wanted: `model._weight_conversions` becomes the transforms that matched, and
    `revert_weight_conversion` reverses these.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    config = LoadStateDictConfig(device_map={"": device}, weight_mapping=get_model_conversion_mapping(model))
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
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
    return LoadingReport(tuple(sorted(missing)), tuple(sorted(info.unexpected_keys)), tuple(sorted(mismatched)))


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar while only headers are loaded."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def tied_names(model: Any) -> dict[str, str]:
    """Parameter → the parameter it repeats, for weights that the model ties (lm_head.weight → embed_tokens.weight)."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return dict(tied) if isinstance(tied, dict) else {}


# --- parameters to Hub tensors


@dataclass(frozen=True)
class ConversionGroup:
    """Parameters that are converted together, and the Hub tensors that they become: key → shape."""

    sources: tuple[str, ...]
    targets: dict[str, tuple[int, ...]]


class HubConverter:
    """Converts one model's parameters to the Hub format of its base, group by group.

    Args:
        model: the model on meta (`hub_config.meta_model`).
        base: the base's tensors (`read_hub_tensors`).
        additions: parameters whose tensors the base may lack, and that get one all the same.

    Attributes:
        groups: every parameter and persistent buffer of the model; but one that only repeats another is in no group if
            the base leaves it out, as save_pretrained does.
        base_only: the base's keys that no parameter becomes (MTP layers).
        dry_load: transformers' report on the base's headers.

    Raises:
        HubFormatError: a parameter becomes a key that the base does not have, or another shape.
    """

    def __init__(self, model: Any, base: Mapping[str, HubTensor], additions: Iterable[str] = ()) -> None:
        self.model = model
        self._additions = set(additions)
        self.base = dict(base)
        self.dry_load = load_tensors(model, on_meta(base.values()), "meta")
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
            raise HubFormatError(
                f"the base's tensors do not fit its own architecture: {first_few(problems)}. Is this the model that "
                "training started from, and does this transformers know its format?"
            )
        self.base_only = sorted(set(self.base) - set(produced))

    def _revert(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        converted = revert_weight_conversion(self.model, state)
        return {self._with_base_prefix(key): tensor for key, tensor in converted.items()}

    def _with_base_prefix(self, key: str) -> str:
        """The base's form of a key: one saved from the bare model lacks the `model.` that loading adds, or has one that
        loading removes. transformers' reversal does not restore it."""
        if key in self.base:
            return key
        prefix = f"{self.model.base_model_prefix}."
        return next((k for k in (key.removeprefix(prefix), prefix + key) if k in self.base), key)

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
        """The group's parameters as from_pretrained would set them, by transformers' loading code.

        `hub` has exactly the group's targets. Used to verify an export; `convert` is not involved.
        """
        conversions = self.model._weight_conversions  # of the whole base: they stay in force
        load_tensors(self.model, hub, "cpu")
        self.model._weight_conversions = conversions
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
