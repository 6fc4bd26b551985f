"""The options of accel_moe, the source of each value, and the mistakes that a user can make.

    in:   arguments to prepare()  >  ACCEL_MOE_<OPTION> in the environment  >  parallelism_config.moe_* of the
          accelerate launcher's YAML (launcher.py)  >  the default
    out:  ResolvedConfig: a MoEConfig, and for each option the place that set it

MoEConfig is the one list of options, one field each. The field's name is the YAML's key, its type and default are the
schema, and its help is a row of docs/options.md (`python -m accel_moe.config` prints the table). omegaconf types,
merges and interpolates (`${oc.env:NAME,default}`) text from the environment and the YAML, in our keys only; the rest
of the file belongs to accelerate. Arguments are Python values and used unchanged.

Every mistake is a ValueError that names the value found, the value expected and the remedy. A misspelt option, and
another project's name for expert parallelism, are such mistakes (spelling.py). This module sees one process and no
model. The floors above decide whether a degree fits the mesh or the experts, and whether a kernel is registered.
config_mismatch() compares the ranks' options; the caller gathers them, which is a collective.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from accel_moe import spelling
from accel_moe.launcher import (
    PARALLELISM_PREFIX,
    LauncherYaml,
    accelerate_keys,
    accelerate_parallelism_keys,
    find_launcher_yaml,
)

ENVIRONMENT_PREFIX = "ACCEL_MOE_"
# omegaconf's word for a missing value
MISSING = "???"
# values of EP_SIZE and the like that turn expert parallelism off
_OFF = ("", "0", "1", "false", "False", "no", "off")
# the two sources without a path or a variable
ARGUMENT, DEFAULT = "argument to prepare()", "default"
# docs/options.md keeps options_table() between these
TABLE_BEGIN, TABLE_END = "<!-- options:begin -->", "<!-- options:end -->"


def option(default: Any, help: str, *, minimum: int | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field of MoEConfig: its default, its help in docs/options.md, its minimum, the words it accepts."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "choices": choices})


@dataclass(frozen=True)
class MoEConfig:
    """Every option, under its name in the YAML. Raises ValueError on a wrong type or a value out of range."""

    moe_ep_degree: int = option(
        1, "How many ranks share one set of experts. 1 turns expert parallelism off.", minimum=1
    )
    moe_kernel: str = option(
        "auto",
        "The function that computes the experts: `scattermoe`, any other name in transformers' "
        "`ALL_EXPERTS_FUNCTIONS` (`grouped_mm`, `batched_mm`, …), or `eager`. `auto` takes `scattermoe` on a GPU, and "
        "`grouped_mm` if Triton cannot run.",
    )
    moe_dispatcher: str = option(
        "auto",
        "How tokens reach the ranks of their experts. `all_gather` sends every token to every rank and makes no host "
        "wait. `symmetric` does the same through memory that the GPUs of a node share, without NCCL. `all_to_all` "
        "sends each token only to the ranks that need it. `auto` takes `all_gather` within a node if most ranks need "
        "most tokens, else `all_to_all`. Any other name in `accel_moe.dispatch.DISPATCHERS` works, too.",
    )
    moe_dispatch_chunk_tokens: int = option(
        0,
        "Dispatch at most this many tokens of a rank at a time, which bounds memory for any routing. Backward sends "
        "and computes each chunk again. 0: all at once.",
        minimum=0,
    )
    moe_recompute_up_projection: bool = option(
        False,
        "Do not keep the output of the experts' up-projection; compute it again in backward. Saves 2 x intermediate "
        "size for each (token, expert) pair of a layer (1 x without a gate). Needs `scattermoe` and a gate that its "
        "kernels know. Of no use under activation checkpointing or in chunks, which compute it again anyway.",
    )
    moe_quantize_experts: str = option(
        "none",
        "Hold frozen experts packed, quantised while they are read, and make a layer dense for its forward and its "
        "backward only. `nf4`: 4 bits, as QLoRA (needs bitsandbytes: the extra `accel_moe[quantize]`). `int8`: 8 bits. "
        "For training adapters: see [4-bit and 8-bit experts](lora.md#4-bit-and-8-bit-experts).",
        choices=("none", "nf4", "int8"),
    )
    moe_keep_exchanged: bool = option(
        True,
        "Under activation checkpointing, keep the received rows until backward instead of exchanging them twice. "
        "`false` saves that memory: (rows received + tokens) x hidden size a layer.",
    )
    moe_async_save: bool = option(
        False, "Save in the background: the step waits only for the copy of the tensors to host memory."
    )
    moe_verify: str = option(
        "checksums",
        "How a checkpoint is checked before it is loaded: the `checksums` of every file, only the `sizes`, or "
        "`present` for a checkpoint that was thinned on purpose. `present` checks the remaining files, and a warning "
        "names the missing parts, which are not restored (the optimizer, for example).",
        choices=("checksums", "sizes", "present"),
    )

    def __post_init__(self) -> None:
        for name in option_names():
            _check(name, getattr(self, name), "MoEConfig")


@dataclass(frozen=True)
class ResolvedConfig:
    """A MoEConfig and the source of each option's value ("default" if nothing set it)."""

    config: MoEConfig
    sources: dict[str, str]

    def describe(self) -> str:
        """One line for rank 0's log: every value with its source."""
        return "accel_moe: " + ", ".join(
            f"{name}={value!r} ({source})" for name, (value, source) in self.for_comparison().items()
        )

    def for_comparison(self) -> dict[str, tuple[Any, str]]:
        """{option: (value, source)}, plain and picklable: each rank's entry for config_mismatch()."""
        return {name: (getattr(self.config, name), source) for name, source in self.sources.items()}


def option_names() -> list[str]:
    """The options, in the order of the table."""
    return [entry.name for entry in fields(MoEConfig)]


def environment_variable(name: str) -> str:
    """moe_ep_degree -> ACCEL_MOE_EP_DEGREE."""
    return ENVIRONMENT_PREFIX + name.removeprefix("moe_").upper()


def resolve(
    options: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    yaml: LauncherYaml | None = None,
) -> ResolvedConfig:
    """The options in force: `options`, else `environ`, else `yaml`, else the defaults. Not a collective.

    Args:
        options: the arguments given to prepare().
        yaml: the launcher's file; None asks the launcher.

    Raises:
        ValueError: an unknown option, a misplaced key, a wrong type, a value out of range, or an interpolation that
            cannot be resolved (`${oc.env:…}` reads os.environ, never `environ`).

    Warns if expert parallelism may be off by mistake (missing_launcher_warning).
    """
    yaml = find_launcher_yaml() if yaml is None else yaml
    arguments = _from_arguments(options or {})
    text = _from_yaml(yaml) | _from_environment(environ, _variables_in(yaml.content))
    text = {name: given for name, given in text.items() if name not in arguments}

    values = _typed(text) if text else {}
    for name, (value, source) in arguments.items():
        _check(name, value, source)
        values[name] = value
    sources = {name: DEFAULT for name in option_names()}
    sources |= {name: source for name, (_, source) in (text | arguments).items()}

    variables = (name for name in environ if name not in _variables_in(yaml.content))
    unread = [name for name in variables if spelling.asks_for_ep(name) and environ[name] not in _OFF]
    for warning in (
        missing_launcher_warning(yaml, sources, environ, sys.modules),
        _unread_variables_warning(unread, sources, environ),
    ):
        if warning:
            warnings.warn(warning, stacklevel=2)
    return ResolvedConfig(MoEConfig(**values), sources)


# ---- The three places that set a value: each gives {option: (value, source)} and refuses unknown names.
# ---- A source is the place in words, for errors and for the log.


def _from_arguments(options: Mapping[str, object]) -> dict[str, tuple[Any, str]]:
    for name in options:
        if name not in option_names():
            meant = spelling.meant_in_our_section(name, option_names())
            nearest = meant or spelling.most_like(name, option_names())
            raise ValueError(f"{name!r} ({ARGUMENT}) is no option of accel_moe. {_nearest(nearest)}")
    return {name: (value, ARGUMENT) for name, value in options.items()}


def _from_environment(environ: Mapping[str, str], referred: set[str]) -> dict[str, tuple[Any, str]]:
    """referred: variables that the YAML's values refer to. They may have any name."""
    known = {environment_variable(name): name for name in option_names()}
    given: dict[str, tuple[Any, str]] = {}
    for variable, value in environ.items():
        if variable in known:
            given[known[variable]] = (value, f"{variable} in the environment")
            continue
        if variable in referred:
            continue
        ours = variable.startswith(ENVIRONMENT_PREFIX)
        if (meant := spelling.meant_in_environment(variable, option_names())) is not None or ours:
            nearest = environment_variable(meant or option_names()[0])
            raise ValueError(
                f"{variable}={value!r} in the environment sets no option of accel_moe. Did you mean {nearest}? "
                f"Known: {', '.join(known)}. Rename the variable, or remove it."
            )
    return given


def _from_yaml(yaml: LauncherYaml) -> dict[str, tuple[Any, str]]:
    _refuse_repeated_keys(yaml)
    _refuse_misplaced_keys(yaml)
    body = yaml.content.get("parallelism_config") or {}
    if not isinstance(body, dict):
        raise ValueError(
            f"parallelism_config of {yaml.path} is a {type(body).__name__}; expected a mapping, such as\n"
            f"parallelism_config:\n  {PARALLELISM_PREFIX}dp_shard_size: 8\n  moe_ep_degree: 8"
        )
    given: dict[str, tuple[Any, str]] = {}
    for key, value in body.items():
        if key in option_names():
            given[key] = (value, f"{yaml.path} (parallelism_config.{key})")
        else:
            _refuse_key_that_nobody_reads(str(key), value, yaml)
    return given


def _refuse_repeated_keys(yaml: LauncherYaml) -> None:
    """Raise for a key that is given twice, if it may be ours: the first would be dropped in silence."""
    for path in yaml.repeated:
        section, _, key = path.rpartition(".")
        ours = section == "parallelism_config" or path == "parallelism_config"
        if ours or spelling.meant_elsewhere(section, key, option_names()) is not None:
            raise ValueError(
                f"{path} is given twice in {yaml.path}; only the last would count. Expected each key once. "
                "Remove one of them."
            )


def _refuse_misplaced_keys(yaml: LauncherYaml) -> None:
    """Raise for a key of ours at the top level (accelerate refuses it, too) or inside another section."""
    for section, key in _keys_elsewhere(yaml.content):
        if key in option_names():
            meant, unknown = key, ""
        else:
            meant = spelling.meant_elsewhere(section, key, option_names())
            unknown = f" ({key} is not an option, either. {_nearest(meant)})" if meant is not None else ""
        if meant is not None:
            place = f"inside {section}" if section else "at the top level"
            raise ValueError(
                f"{key} is {place} of {yaml.path}, where it has no effect. Move it into parallelism_config.{unknown}"
            )


def _keys_elsewhere(content: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """(section, key) of every key outside parallelism_config that accelerate does not read in its place."""
    for section, body in content.items():
        if section == "parallelism_config":
            continue
        if section not in accelerate_keys():
            yield "", str(section)
        inside = [body]
        while inside:
            part = inside.pop()
            if isinstance(part, dict):
                fixed = str(section).removesuffix("_config")
                read = (key for key in part if not {str(key), f"{fixed}_{key}"} & accelerate_keys())
                yield from ((str(section), str(key)) for key in read)
                inside += part.values()
            elif isinstance(part, list):
                inside += part


def _refuse_key_that_nobody_reads(key: str, value: object, yaml: LauncherYaml) -> None:
    """Raise for a key of parallelism_config that is meant for us or for accelerate, and that neither reads.

    For us: moe_epdegree, mo_ep_degree, MOE_EP_DEGREE, moe-ep-degree, ep_degree, ep_size, parallelism_config_ep_size.
    For accelerate: `dp_shard_size: 2`, which it ignores in silence, and then trains on the wrong mesh. Another
    library's key passes.
    """
    if key in accelerate_parallelism_keys():
        return
    if (meant := spelling.meant_in_our_section(key, option_names())) is not None:
        raise ValueError(f"{key!r} in parallelism_config of {yaml.path} is no option of accel_moe. {_nearest(meant)}")
    known = sorted(accelerate_parallelism_keys())
    for prefixed in (PARALLELISM_PREFIX + key, f"{PARALLELISM_PREFIX}{key}_size"):
        if prefixed in known:
            raise ValueError(
                f"`{key}: {value}` in parallelism_config of {yaml.path} has no effect: accelerate reads only "
                f"keys that begin with {PARALLELISM_PREFIX!r}. Write `{prefixed}: {value}`."
            )
    if key.startswith(PARALLELISM_PREFIX):
        raise ValueError(
            f"`{key}: {value}` in parallelism_config of {yaml.path} has no effect: accelerate has no such key. Use "
            f"one of {', '.join(known)}, or remove it."
        )


def _nearest(meant: str) -> str:
    """The nearest option, and all options."""
    return f"Did you mean {meant}? Known: {', '.join(option_names())}."


def _variables_in(content: object) -> set[str]:
    """The environment variables that the values of our keys refer to: `${oc.env:NAME,default}`."""
    body = content.get("parallelism_config") if isinstance(content, Mapping) else None
    values = [str(value) for key, value in body.items() if key in option_names()] if isinstance(body, Mapping) else []
    return {name for value in values for name in re.findall(r"oc\.env:\s*([^,}\s]+)", value)}


# ---- From text to typed values


def _typed(text: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """Typed, interpolated values of {option: (value as written, source)}: omegaconf over MoEConfig's schema.

    An option may refer to the environment (`${oc.env:NAME}`) and to another option (`${moe_ep_degree}`).
    """
    from omegaconf import OmegaConf  # imported here: MoEConfig() and plain arguments do not need it
    from omegaconf.errors import OmegaConfBaseException

    merged: Any = OmegaConf.structured(MoEConfig)
    for name, (value, source) in text.items():
        if isinstance(value, str) and value.strip() == MISSING:
            raise _wrong(name, value, source)  # omegaconf would take the default
        if not isinstance(value, str):
            _check(name, value, source)  # stricter than omegaconf, which takes `moe_kernel: true` for "True"
        try:
            merged = OmegaConf.merge(merged, {name: value})
        except OmegaConfBaseException as error:
            raise _wrong(name, value, source, error) from error
    values: dict[str, Any] = {}
    for name, (value, source) in text.items():
        try:
            values[name] = merged[name]  # interpolates, and fails for an unset variable
        except OmegaConfBaseException as error:
            raise _wrong(name, value, source, error) from error
        _check(name, values[name], source)
    return values


def _check(name: str, value: object, source: str) -> None:
    """Raise ValueError unless `value` has the option's type and range."""
    minimum = _metadata(name)["minimum"]
    right = type(value) in _types(name)  # not isinstance: to Python, True is an int
    if isinstance(value, str):
        choices = _metadata(name)["choices"]
        right = right and (value in choices if choices else value.strip() != "")
    elif isinstance(value, int) and minimum is not None:
        right = right and value >= minimum
    if not right:
        raise _wrong(name, value, source)


def _wrong(name: str, value: object, source: str, error: Exception | None = None) -> ValueError:
    """The ValueError for a value that option `name` does not accept; `error` is omegaconf's, if any."""
    words = {int: "a whole number", str: "a name", bool: "true or false", type(None): "null"}
    expected = " or ".join(words[kind] for kind in _types(name))
    if choices := _metadata(name)["choices"]:
        expected = " or ".join(choices)
    if _metadata(name)["minimum"] is not None:
        expected += f" of at least {_metadata(name)['minimum']}"
    default = getattr(MoEConfig, name)
    if error is not None and "${" in str(value):
        reason = str(error).splitlines()[0]
        return ValueError(
            f"{name}={value!r} ({source}) does not resolve to {expected}: {reason}. "
            f"Set the variable or option that it refers to, or give a default: ${{oc.env:NAME,{default}}}."
        )
    return ValueError(
        f"{name}={value!r} ({source}) is not {expected}. Change it, or remove it for the default, {default!r}."
    )


def _metadata(name: str) -> Mapping[str, Any]:
    return MoEConfig.__dataclass_fields__[name].metadata


def _types(name: str) -> tuple[type, ...]:
    """int -> (int,); int | None -> (int, NoneType)."""
    hint = get_type_hints(MoEConfig)[name]
    return get_args(hint) or (hint,)


# ---- Decisions about ranks, as plain functions


def missing_launcher_warning(
    yaml: LauncherYaml, sources: Mapping[str, str], environ: Mapping[str, str], modules: Mapping[str, Any]
) -> str | None:
    """A warning for several ranks without an accelerate launcher and without moe_ep_degree; else None.

    That is torchrun, or a launcher that we failed to see: the user's `moe_ep_degree: 8` would be ignored in silence.
    None in a notebook, under pytest, in a single process, and on all but a machine's first rank.

    Args:
        modules: sys.modules, which shows whether this is a notebook or pytest.
    """
    # the variables that accelerate reads
    sizes = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
    ranks = ["LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"]
    world_size = next((environ[name] for name in sizes if name in environ), "1")
    local_rank = next((environ[name] for name in ranks if name in environ), "0")
    attended = "ipykernel" in modules or "pytest" in modules or "PYTEST_CURRENT_TEST" in environ
    if yaml.status != "no_launcher" or sources["moe_ep_degree"] != DEFAULT:
        return None
    if world_size == "1" or local_rank != "0" or attended:
        return None
    variable = environment_variable("moe_ep_degree")
    return (
        f"{world_size} ranks, but no `accelerate launch` process above them whose YAML could be read: expert "
        f"parallelism is off (moe_ep_degree=1). To turn it on, set {variable}, pass moe_ep_degree to "
        f"prepare(), or start with `accelerate launch --config_file …`. To keep it off without this warning, set "
        f"{variable}=1."
    )


def _unread_variables_warning(
    unread: Sequence[str], sources: Mapping[str, str], environ: Mapping[str, str]
) -> str | None:
    """A warning for EP_SIZE or the like, if nothing reads it and nothing sets moe_ep_degree; else None.

    Only a warning, and only on a machine's first rank: the name may be a script's own.
    """
    if not unread or sources["moe_ep_degree"] != DEFAULT or environ.get("LOCAL_RANK", "0") != "0":
        return None
    variable = environment_variable("moe_ep_degree")
    found = ", ".join(f"{name}={environ[name]}" for name in unread)
    return (
        f"{found} in the environment is not read by accel_moe: expert parallelism is off "
        f"(moe_ep_degree=1). To turn it on, set {variable}. To keep it off without this warning, set {variable}=1."
    )


def config_mismatch(per_rank: Sequence[Mapping[str, tuple[Any, str]]]) -> str | None:
    """An error message if the ranks have different values, else None. Equal lists give equal messages.

    Args:
        per_rank: each rank's ResolvedConfig.for_comparison(), in rank order. Sources may differ, values may not.
    """
    differences = []
    for name in dict.fromkeys(name for config in per_rank for name in config):
        ranks_with: dict[str, list[int]] = {}
        for rank, config in enumerate(per_rank):
            ranks_with.setdefault(repr(config[name][0]) if name in config else "unknown", []).append(rank)
        if len(ranks_with) == 1:
            continue
        found = []
        for value, ranks in ranks_with.items():
            sources = dict.fromkeys(per_rank[rank][name][1] for rank in ranks if name in per_rank[rank])
            found.append(f"{value} on {spell_ranks(ranks)} ({' and '.join(sources) or 'an older accel_moe?'})")
        differences.append(f"{name} differs between ranks: {', '.join(found)}.")
    if not differences:
        return None
    return " ".join(differences) + (
        " Expected one value everywhere: give every machine the same --config_file, the same "
        "ACCEL_MOE_* variables and the same arguments to prepare()."
    )


def spell_ranks(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"


# ---- The table of docs/options.md


def options_table() -> str:
    """The options as a markdown table: key, environment variable, default, meaning."""
    rows = ["| key | environment variable | default | meaning |", "|---|---|---|---|"]
    for entry in fields(MoEConfig):
        cells = [f"`{entry.name}`", f"`{environment_variable(entry.name)}`", f"`{entry.default}`"]
        cells.append(entry.metadata["help"].replace("|", "\\|"))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(options_table())
