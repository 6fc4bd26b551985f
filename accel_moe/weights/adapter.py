"""A PEFT LoRA adapter without PEFT: the settings of its config, and the change that it makes to each weight.

A saved adapter is a list of names and a few numbers. This file says which weight of the base every name changes, and
computes the changed weight in float32, as PEFT's `merge_and_unload` does. Names and layouts are those of peft 0.21.2:

    model.layers.0.self_attn.q_proj.lora_A.weight      [r, in]; with lora_B [out, r] it changes q_proj.weight
    model.embed_tokens.lora_embedding_A                [r, rows]; with lora_embedding_B [dim, r]
    model.layers.0.mlp.experts.lora_A.weight           [E * r, in]; with lora_B [out, r * E] it changes one parameter
    model.layers.0.mlp.experts.base_layer.lora_A.weight   the same of another parameter of the module
    model.norm.weight                                  trained whole (`modules_to_save`, `bias`): it replaces the base's

PEFT wraps the parameters of one module around each other, in the order in which the module registered them: the name
without `base_layer` is the last one's. In lora_A the rank is the inner dimension, in lora_B the expert is.

An adapter may name a projection of one expert (`experts.3.w1`), as models were before their experts were fused. That is
a tensor of the base's files and no parameter of the model: the change is made to that tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from accel_moe.errors import CheckpointError, first_few

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_CHUNK_BYTES = 256 * 2**20  # of a change that is in memory at once, in float32
_PAIR = re.compile(r"(?P<path>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(?P<weight>\.weight)?")
_NAMED = re.compile(r"(?P<before>.+\.(?:lora_[A-Za-z_]+|modules_to_save))\.(?P<adapter>[^.]+)(?P<after>(?:\.[^.]+)*)")
# each changes the arithmetic: without it the result would be another model
_NOT_MERGED = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config")
_NOT_MERGED += ("kasa_config", "monteclora_config", "layer_replication", "megatron_config", "trainable_token_indices")
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` that are computed from the base's weights, and change them when a run starts."""
_MERGE_WITH_PEFT = (
    "Merge it with PEFT, in one process that holds the model: PeftModel.from_pretrained(AutoModelForCausalLM"
    ".from_pretrained(BASE), ADAPTER).merge_and_unload().save_pretrained(OUT)."
)


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of an adapter_config.json that say how large its changes are, and which parameters it names."""

    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_parameters: tuple[str, ...]
    base: str | None

    @staticmethod
    def read(fields: Mapping[str, Any], where: str) -> AdapterConfig:
        """Raises CheckpointError when the adapter is no plain LoRA, or the config lacks a field or has another kind."""
        kind = str(fields.get("peft_type"))
        if kind != "LORA":
            raise CheckpointError(f"{where} is of type {kind}, expected LORA. {_MERGE_WITH_PEFT}")
        if found := [name for name in _NOT_MERGED if fields.get(name)]:
            raise CheckpointError(
                f"{where} has {found[0]}: {fields[found[0]]!r}, expected plain LoRA, scale * B @ A. {_MERGE_WITH_PEFT}"
            )
        start = str(fields.get("init_lora_weights")).lower()
        if start.startswith(CHANGES_THE_BASE):
            raise CheckpointError(
                f"{where} has init_lora_weights: {start}, which changed the base's weights when training began: the "
                "adapter does not belong to the base's files. Save it with PEFT's save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...), and give that."
            )
        try:
            return AdapterConfig(
                r=int(fields["r"]),
                alpha=float(fields["lora_alpha"]),
                rslora=bool(fields.get("use_rslora")),
                rank_pattern=dict(fields.get("rank_pattern") or {}),
                alpha_pattern=dict(fields.get("alpha_pattern") or {}),
                target_parameters=tuple(fields.get("target_parameters") or ()),
                base=fields.get("base_model_name_or_path") or None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where} is not a LoRA config as PEFT writes it ({type(error).__name__}: {error}). Restore the file."
            ) from None

    def rank_and_scale(self, target: str) -> tuple[int, float]:
        """The rank and the scale of one module, or of `module.parameter`, by its name in the model."""
        r = _of_pattern(self.rank_pattern, target, self.r)
        alpha = _of_pattern(self.alpha_pattern, target, self.alpha)
        return r, alpha / (math.sqrt(r) if self.rslora else r)

    def targets(self, name: str) -> bool:
        """Whether `target_parameters` means the parameter `name`."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)


def _of_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


@dataclass(frozen=True)
class LowRankChange:
    """scale * lora_B @ lora_A, added to a weight.

    Attributes:
        a, b: the names that the factors are stored under.
        experts: E of a stack of experts [E, ...]; 0 for a matrix.
        transposed: the weight lies [in, out] (embeddings, Conv1D, gpt_oss' experts), B @ A is [out, in].
    """

    a: str
    b: str
    scale: float
    experts: int = 0
    transposed: bool = False

    def add_to(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Adds the change to a float32 weight in place, a part at a time. Factors in any dtype count as float32."""
        assert weight.dtype == torch.float32
        a, b = a.float(), b.float()
        if not self.experts:
            rows = weight.t() if self.transposed else weight  # [out, in]
            for part in _parts(len(rows), rows.shape[1]):
                rows[part] += (b[part] @ a) * self.scale
            return
        a = a.reshape(self.experts, -1, a.shape[-1])
        b = b.reshape(len(b), -1, self.experts)
        into = "o r e, e r i -> e i o" if self.transposed else "o r e, e r i -> e o i"
        for part in _parts(self.experts, weight[0].numel()):
            weight[part] += torch.einsum(into, b[..., part], a[part]) * self.scale


def _parts(count: int, numbers: int) -> Iterable[slice]:
    """Slices of `count` rows of so many numbers, each of at most _CHUNK_BYTES (at least one row)."""
    step = max(1, _CHUNK_BYTES // (4 * max(1, numbers)))
    return (slice(first, first + step) for first in range(0, count, step))


@dataclass
class Changes:
    """The changes of an adapter, by the weight that they change.

    Attributes:
        replaced: parameter → the stored name whose values it takes.
        added: parameter → its low-rank changes.
        in_files: the same, by key of the base's files, for adapters that name single experts.
        problems: one line for everything of the adapter that the base has no place for.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    added: dict[str, list[LowRankChange]] = field(default_factory=dict)
    in_files: dict[str, list[LowRankChange]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def plain_names(names: Collection[str], adapter: str | None = None) -> dict[str, str]:
    """Name in PEFT's files → name as it is stored, for the tensors of one adapter.

    A live model's names have the adapter's in them (`lora_A.default.weight`), PEFT's files do not. With several
    adapters in them, `adapter` says which one is meant.

    Raises CheckpointError when several adapters are in there and none is meant.
    """
    found: dict[str, str] = {}
    adapters: set[str] = set()
    for name in names:
        match = _NAMED.fullmatch(name)
        if match is None or (match["adapter"] in ("weight", "bias") and not match["after"]):
            found[name] = name
            continue
        adapters.add(match["adapter"])
        if adapter in (None, match["adapter"]):
            found[f"{match['before'].removesuffix('.modules_to_save')}{match['after']}"] = name
    if adapter is None and len(adapters) > 1:
        raise CheckpointError(
            f"found the adapters {', '.join(sorted(adapters))}, expected one. Save each with PEFT's "
            "save_pretrained(..., selected_adapters=[...]), and give the folder of one."
        )
    return {plain: name for plain, name in found.items() if ".original_module." not in plain}


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a PEFT model's."""
    return any(".lora_" in name or name.startswith(PREFIX) for name in names)


def plan_changes(
    shapes: Mapping[str, tuple[int, ...]],
    config: AdapterConfig,
    model: nn.Module,
    files: Mapping[str, tuple[int, ...]],
) -> Changes:
    """Says which weight each stored tensor of an adapter changes.

    Args:
        shapes: the adapter's tensors, by PEFT's names.
        model: the base on meta.
        files: shape of each tensor of the base's files, by key.
    """
    return _Planner(shapes, config, model, files).changes


class _Planner:
    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        config: AdapterConfig,
        model: nn.Module,
        files: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.shapes, self.config, self.files = shapes, config, files
        self.modules = dict(model.named_modules())
        self.state = model.state_dict()
        self.changes = Changes()
        for path, depths in self._pairs().items():
            self._plan_module(path, depths)

    def _pairs(self) -> dict[str, dict[int, dict[str, str]]]:
        """Module → depth of wrapping → {"A": stored name, "B": stored name}. Everything else replaces a parameter."""
        pairs: dict[str, dict[int, dict[str, str]]] = {}
        for stored in self.shapes:
            name = stored.removeprefix(PREFIX)
            match = _PAIR.fullmatch(name)
            if match is not None and bool(match["weight"]) != bool(match["kind"]):
                path = match["path"]
                depth = path.count(".base_layer")
                path = path.replace(".base_layer", "")
                pairs.setdefault(path, {}).setdefault(depth, {})[match["factor"]] = stored
            else:
                self._plan_replacement(name.replace(".base_layer", ""), stored)
        return pairs

    def _plan_replacement(self, name: str, stored: str) -> None:
        if ".lora_" in name or ".token_adapter." in name:
            self.changes.problems.append(f"{stored} is no lora_A, lora_B or whole weight, and is not merged")
        elif name not in self.state:
            self.changes.problems.append(f"{stored} is a weight that the base does not have")
        else:
            self.changes.replaced[name] = stored

    def _plan_module(self, path: str, depths: dict[int, dict[str, str]]) -> None:
        halves = [names for names in depths.values() if len(names) == 1]
        if halves:
            (found,) = halves[0].values()
            self.changes.problems.append(f"{found} has no other half")
        elif path not in self.modules:
            self._plan_file(path, depths[0])
        elif wrapped := self._target_parameters(path):
            if sorted(depths) != list(range(len(wrapped))):
                self.changes.problems.append(
                    f"{path} has {len(depths)} pairs of lora_A and lora_B, and target_parameters names "
                    f"{', '.join(wrapped)}"
                )
                return
            for depth, names in depths.items():
                parameter = wrapped[len(wrapped) - 1 - depth]
                self._plan_parameter(path, parameter, f"{path}.{parameter}", names)
        elif f"{path}.weight" in self.state and list(depths) == [0]:
            self._plan_parameter(path, "weight", path, depths[0])
        else:
            self.changes.problems.append(
                f"{first_few(sorted(depths[min(depths)].values()), shown=1)} changes {path}, which has no weight that "
                "target_modules or target_parameters means"
            )

    def _target_parameters(self, path: str) -> list[str]:
        """The module's own parameters that `target_parameters` means, in the module's order."""
        own = self.modules[path].named_parameters(recurse=False)
        return [name for name, _ in own if self.config.targets(f"{path}.{name}")]

    def _plan_file(self, path: str, names: dict[str, str]) -> None:
        key = f"{path}.weight"
        if key not in self.files:
            self.changes.problems.append(f"{names['A']} changes {path}, which the base does not have")
            return
        r, scale = self.config.rank_and_scale(path)
        change = LowRankChange(names["A"], names["B"], scale)
        self._check_shapes(change, r, *reversed(self.files[key]))
        self.changes.in_files.setdefault(key, []).append(change)

    def _plan_parameter(self, path: str, parameter: str, target: str, names: dict[str, str]) -> None:
        """`target` is the name that patterns of rank and alpha are compared with."""
        module, shape = self.modules[path], tuple(self.state[f"{path}.{parameter}"].shape)
        if len(shape) not in (2, 3):
            self.changes.problems.append(f"{names['A']} changes {path}.{parameter}, which has shape {shape}")
            return
        experts = shape[0] if len(shape) == 3 else 0
        if experts:
            transposed = bool(getattr(module, "is_transposed", False))
        else:
            transposed = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
        inner, outer = shape[-2:] if transposed else reversed(shape[-2:])
        r, scale = self.config.rank_and_scale(target)
        change = LowRankChange(names["A"], names["B"], scale, experts, transposed)
        self._check_shapes(change, r, inner, outer)
        self.changes.added.setdefault(f"{path}.{parameter}", []).append(change)

    def _check_shapes(self, change: LowRankChange, r: int, inner: int, outer: int) -> None:
        rows = r * max(1, change.experts)
        for stored, expected in ((change.a, (rows, inner)), (change.b, (outer, rows))):
            if self.shapes[stored] != expected:
                self.changes.problems.append(f"{stored} has shape {self.shapes[stored]}, expected {expected}")


def unmerged(problems: Sequence[str], adapter: str, base: str) -> str:
    """The error's text for an adapter that does not fit its base."""
    return (
        f"{adapter} is not an adapter of {base}: {first_few(problems)}. Give the base that the adapter was trained on; "
        f"if this is it, consolidate cannot merge this adapter. {_MERGE_WITH_PEFT}"
    )
