"""Every Mixture-of-Experts family of the installed transformers, found by reading transformers, not from a list.

A family is a folder of `transformers.models` whose modeling file has a class named like experts or a Mixture-of-Experts
block. A folder with a config and no modeling file counts, too, if transformers' auto classes give it such a family's
model (sarvam_moe gets glm4_moe's). A model that only contains another family's text model (kimi_k25: deepseek_v3's) has
no row of its own.

A family is on the experts interface if a class carries `@use_experts_implementation`. One of its experts modules is
then made on the meta device from the family's default config: no weight is allocated, no file downloaded. The `refusal`
that `prepare()` calls decides whether and how it runs.

Two lists are written by hand: the reasons why a family is off the interface (`recognise.OFF_INTERFACE`), and the
families that this package's tests train over several ranks (`OVER_RANKS`, which those tests read).
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from accel_moe.experts import recognise, view
from accel_moe.kernels.glu import glu_of, has_default_glu

_DECORATED = re.compile(r"^@use_experts_implementation[^\n]*\n(?:@[^\n]*\n)*class (\w+)", re.MULTILINE)
_CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
_AUTO_NAMES = re.compile(r"MODEL_(FOR_\w+_)?MAPPING_NAMES$")
_LOOKALIKE = re.compile(
    r"^class (\w*(?:Experts?|MoE|Moe|MOE|SparseMLP|MoeBlock)\w*)\((?:nn\.Module|nn\.ModuleList|nn\.ModuleDict)\)",
    re.MULTILINE,
)

TESTS = ("ep", "consolidate", "load")
"""The tests of a family, in the table's order."""

OVER_RANKS = (
    "qwen3_moe", "mixtral", "olmoe", "granitemoe", "deepseek_v3", "glm4_moe",
    "deepseek_v4", "gpt_oss", "openai_privacy_filter", "nemotron_h", "step3p7", "gemma4", "inkling", "zaya",
    "aria",
)  # fmt: skip
"""Families that the tests train with expert parallelism over gloo ranks in the default run."""

ROUND_TRIP = ("qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "nemotron_h", "qwen3_vl_moe")
"""Families that the default test run reads into shards, trains, saves, consolidates and reads back."""


@dataclass(frozen=True)
class Source:
    """One family as its modeling files define it, before any is imported.

    Attributes:
        name: the folder under transformers.models, which is the model_type of most families.
        decorated: (module, class) of each class on the experts interface.
        lookalikes: classes off the interface that are named like experts.
        model_type: the registered name of the config, if the family runs another family's modeling file; else "".
    """

    name: str
    decorated: tuple[tuple[str, str], ...]
    lookalikes: tuple[tuple[str, str], ...]
    model_type: str = ""


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        status: "supported", "shim" (supported, off the interface) or "refused".
        maths: gate, activation and layout in words.
        kernel: the kernel that `moe_kernel: auto` takes on a GPU.
        note: the reason for a refusal, or for a kernel other than scattermoe; else "".
        hub_keys: the Hub's layout of the experts: "per expert", "fused" or "as in memory".
        tested: for each of `TESTS`, "yes", "slow" or "no"; empty for a refused family.
    """

    name: str
    experts: tuple[str, ...]
    status: str
    maths: str
    kernel: str
    note: str
    hub_keys: str
    tested: tuple[str, ...]


def sources() -> list[Source]:
    """Every family of the installed transformers that has experts, sorted by name. Reads source text only."""
    import transformers

    found, owners = [], {}
    root = Path(transformers.__file__).parent / "models"
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        decorated: list[tuple[str, str]] = []
        lookalikes: list[tuple[str, str]] = []
        models: list[str] = []
        for file in sorted(folder.glob("modeling_*.py")):
            text = file.read_text(encoding="utf-8")
            module = f"transformers.models.{folder.name}.{file.stem}"
            classes = _DECORATED.findall(text)
            decorated += [(module, name) for name in classes]
            lookalikes += [(module, name) for name in _LOOKALIKE.findall(text) if name not in classes]
            models += _CLASS.findall(text)
        if decorated or lookalikes:
            found.append(Source(folder.name, tuple(decorated), tuple(lookalikes)))
            owners.update(dict.fromkeys(models, found[-1]))
    return sorted([*found, *_without_modeling_file(root, owners)], key=lambda source: source.name)


def _without_modeling_file(root: Path, owners: dict[str, Source]) -> list[Source]:
    """Families to which transformers' auto classes give another family's model.

    Args:
        owners: {model class name: the family whose modeling file has it}.
    """
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    found: dict[str, Source] = {}
    for mapping in (value for name, value in vars(modeling_auto).items() if _AUTO_NAMES.match(name)):
        for model_type, names in mapping.items():
            folder = root / model_type_to_module_name(model_type)
            names = (names,) if isinstance(names, str) else names
            owner = next((owners[name] for name in names if name in owners), None)
            if owner is not None and not any(folder.glob("modeling_*.py")):
                found[folder.name] = Source(folder.name, owner.decorated, owner.lookalikes, model_type)
    return list(found.values())


def config_classes(source: Source, module_name: str) -> list[type]:
    """The config classes of this modeling file's models, in the file's order, each once."""
    from transformers import CONFIG_MAPPING, PreTrainedModel

    if source.model_type:
        return [CONFIG_MAPPING[source.model_type]]
    module = importlib.import_module(module_name)
    models = (
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
    )
    return list(dict.fromkeys(c for m in models if (c := getattr(m, "config_class", None)) is not None))


def build_experts(module_name: str, class_name: str, configs: Iterable) -> nn.Module:
    """One experts module, without its model, from the first of these configs that it accepts.

    Raises:
        ValueError: no config fits; the message has the error of every attempt.
    """
    cls = getattr(importlib.import_module(module_name), class_name)
    failures = []
    for config in configs:
        try:
            built = cls(config)
        except Exception as error:
            failures.append(f"{type(config).__name__}: {type(error).__name__}: {error}")
            continue
        if built._parameters.get("down_proj") is not None:
            return built
    raise ValueError(f"{class_name} cannot be built from a config of its file. {'; '.join(failures)}")


def _defaults(classes: list[type]) -> Iterator:
    """Each class's default config; then the same configs with experts, for defaults that are dense models."""
    for cls in classes:
        try:
            yield cls()
        except Exception:
            continue
    for cls in classes:
        try:
            config = cls()
        except Exception:
            continue
        for name, value in list(vars(config).items()):
            if not re.search(r"num_(local_)?experts$|n_routed_experts$|moe_intermediate_size$", name):
                continue
            if value is None or value == 0:
                vars(config)[name] = 8
            elif isinstance(value, list):
                vars(config)[name] = value[0]  # past the config's own type check
        yield config


def tests_of(family: str, limited: bool = False) -> tuple[str, ...]:
    """For each of `TESTS`: "yes" (the default test run), "slow" (with --slow) or "no".

    Args:
        limited: the family runs with moe_ep_degree 1 only.
    """
    if limited:
        return ("no", "no", "yes")
    over_ranks = "yes" if family in OVER_RANKS else "slow"
    return (over_ranks, "yes" if family in ROUND_TRIP else "slow", "yes")


def families(names: Iterable[str] | None = None) -> list[Family]:
    """The table of all or of these families. Imports their modeling files (some seconds for all)."""
    only = None if names is None else set(names)
    return [_row(source) for source in sources() if only is None or source.name in only]


def _row(source: Source) -> Family:
    classes = tuple(name for _, name in source.decorated)
    shims = tuple((module, name) for module, name in source.lookalikes if name in view.SHIMS)
    if not classes and not shims:
        note = recognise.OFF_INTERFACE.get(source.name, "its experts are not on transformers' experts interface")
        return Family(source.name, tuple(n for _, n in source.lookalikes), "refused", "", "", note, "", ())
    layers, problems = [], []
    for module, name in source.decorated or shims:
        try:
            with torch.device("meta"):
                layers.append(build_experts(module, name, _defaults(config_classes(source, module))))
        except (ValueError, ImportError) as error:  # a modeling file may need a package that is not installed
            problems.append(str(error))
    classes = classes or tuple(name for _, name in shims)
    if not layers:
        return Family(source.name, classes, "refused", "", "", problems[0], "", ())
    refusals = [why for layer in layers if (why := recognise.refusal(layer, kernel="auto", ep_degree=1))]
    not_ours = [why for layer in layers if (why := recognise.not_scattermoe(layer))]
    maths = "; ".join(dict.fromkeys(describe_maths(layer) for layer in layers))
    keys = hub_key_style(source.name)
    if refusals:
        return Family(source.name, classes, "refused", maths, "", refusals[0], keys, ())
    status = "supported" if source.decorated else "shim"
    kernel = "grouped_mm" if not_ours else "scattermoe"
    limits = recognise.limits(layers[0])
    note = "; ".join(filter(None, [limits, not_ours[0] if not_ours else ""]))
    return Family(source.name, classes, status, maths, kernel, note, keys, tests_of(source.name, bool(limits)))


def describe_maths(module: nn.Module) -> str:
    """One experts module's maths in words, from its flags, activation and gate."""
    layout = view.as_interface(module)
    words = []
    activation = getattr(module, "act_fn", None)
    name = getattr(activation, "__name__", type(activation).__name__) if activation is not None else "swiglu"
    if (gate := glu_of(layout)) is not None:
        words.append(gate.describe())
    elif not layout.has_gate:
        words.append(f"{name}, no gate")
    elif has_default_glu(layout):
        words.append(f"{name} gate")
    else:
        words.append(f"{name}, own gate")
    if layout.has_bias:
        words.append("bias")
    if layout.is_transposed:
        words.append("transposed")
    if not layout.is_concatenated:
        words.append("interleaved")
    if getattr(layout, "has_post_expert_norm", False):
        words.append("norm after")
    return ", ".join(words)


def hub_key_style(family: str) -> str:
    """The Hub's layout of this family's experts: "per expert (…)", "fused (…)" or "as in memory".

    It comes from transformers' own conversion mapping.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for name in (family, f"{family}_text"):
        for transform in get_checkpoint_conversion_mapping(name) or ():
            patterns, targets = _patterns(transform, "source_patterns"), _patterns(transform, "target_patterns")
            if not any(re.search(r"(down|gate_up|up)_proj", target) for target in targets):
                continue
            if shown := next((p for p in patterns if re.search(r"(?<!shared_)experts?\b|(?i:moe)", p)), None):
                plain = shown.replace("\\", "").strip(".^$")
                return f"per expert ({plain})" if re.search(r"experts\.+\*", plain) else f"fused ({plain})"
    return "as in memory"


def _patterns(transform: object, name: str) -> list[str]:
    found = getattr(transform, name, ())
    return [found] if isinstance(found, str) else list(found)
