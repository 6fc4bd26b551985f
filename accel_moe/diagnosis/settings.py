"""The user's accelerate config: its keys, its mesh, and the smaller mesh of the same shape that the doctor trains on.

The rules are config.py's, mesh.py's and accelerate's own. Here their errors become lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from accel_moe import config
from accel_moe.accelerate_settings import AccelerateSettings
from accel_moe.config import MoEConfig
from accel_moe.diagnosis.report import FAILED, Line, failed, one_line, passed
from accel_moe.launcher import PARALLELISM_PREFIX, LauncherYaml, read_config_file
from accel_moe.mesh import MeshPlan, plan_mesh

MOST_RANKS = 4
WITHOUT_GPU = ("eager", "grouped_mm", "batched_mm")
AXES = ("dp_replicate", "dp_shard", "cp", "tp", "sp")
ACCEPTED = "settings of accelerate"
_MEND = {"YAML is accelerate's": "Correct the file.", "options of accel_moe": "Correct the file or the variable."}


@dataclass(frozen=True)
class Settings:
    """The options in force and the mesh.

    Attributes:
        checkpointing: fsdp_activation_checkpointing.
        mixed_precision: as accelerate has it.
    """

    options: MoEConfig
    plan: MeshPlan
    checkpointing: bool
    mixed_precision: str = "no"


def read(path: str | None, ranks_here: int) -> tuple[list[Line], Settings | None]:
    """The lines of the file, and the settings; None if a line has failed.

    Args:
        path: the file; None takes the environment's options, and one ep group of all ranks if that sets no degree.
        ranks_here: the number of processes if there is no file.

    Raises:
        ValueError: the file cannot be read.
    """
    if path is not None and not Path(path).is_file():
        raise ValueError(f"--config_file {path} is no file. Expected the YAML that `accelerate launch` gets.")
    yaml = LauncherYaml("no_file") if path is None else read_config_file(path)
    found: list[Line] = []

    def tried(subject: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # accelerate raises several kinds
            found.append(failed(subject, one_line(error), _MEND.get(subject, "")))
            return None

    if path is not None and tried("YAML is accelerate's", lambda: _read_by_accelerate(path)) is not None:
        found.append(passed("YAML is accelerate's", path))
    resolved = tried("options of accel_moe", lambda: config.resolve(yaml=yaml))
    if resolved is None:
        return found, None
    options = resolved.config
    if path is None and resolved.sources["moe_ep_degree"] == config.DEFAULT:
        options = MoEConfig(**{**vars(options), "moe_ep_degree": ranks_here})
    told = ", ".join(f"{name}={getattr(options, name)}" for name in _changed(options)) or "all defaults"
    found.append(passed("options of accel_moe", told))
    if path is not None:
        degree = f"moe_ep_degree={options.moe_ep_degree} ({resolved.sources['moe_ep_degree']})"
        of_yaml = tried(ACCEPTED, lambda: _accelerate_of(yaml.content, degree if options.moe_ep_degree > 1 else None))
        if of_yaml is not None:
            found.append(passed(ACCEPTED, f"{of_yaml.kind}, mixed_precision {of_yaml.mixed_precision}"))
    plan = tried("mesh", lambda: _plan(yaml.content, options.moe_ep_degree, ranks_here))
    if plan is not None:
        found.append(passed("mesh", plan.describe()))
    if any(line.mark == FAILED for line in found):
        return found, None
    fsdp = yaml.content.get("fsdp_config") or {}
    return found, Settings(options, plan, bool(fsdp.get("fsdp_activation_checkpointing")), _precision(yaml.content))


def _changed(options: MoEConfig) -> list[str]:
    return [entry.name for entry in fields(MoEConfig) if getattr(options, entry.name) != entry.default]


def _read_by_accelerate(path: str) -> Any:
    from accelerate.commands.config.config_args import load_config_from_file

    return load_config_from_file(path)


def _plan(content: dict[str, Any], ep_degree: int, ranks_here: int) -> MeshPlan:
    ranks = ranks_here if content.get("num_processes") is None else content["num_processes"]
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"num_processes is {ranks!r}: expected a whole number above 0. Correct the file.")
    sizes = _sizes(content)
    return plan_mesh(
        ranks,
        ep_degree,
        dp_replicate=sizes.get("dp_replicate", 1),
        dp_shard=sizes.get("dp_shard"),
        cp=sizes.get("cp", 1),
    )


def _sizes(content: dict[str, Any]) -> dict[str, int]:
    """Of the axes that the file names."""
    body = content.get("parallelism_config") or {}
    found = {axis: body.get(f"{PARALLELISM_PREFIX}{axis}_size") for axis in AXES}
    return {axis: int(size) for axis, size in found.items() if size is not None}


def _precision(content: dict[str, Any]) -> str:
    return str(content.get("mixed_precision") or "no").lower().replace("false", "no")  # YAML reads a bare no as false


def _accelerate_of(content: dict[str, Any], degree: str | None) -> AccelerateSettings:
    """Raises ValueError: accelerate refuses the mesh, or expert parallelism of `degree` the settings around it."""
    from accelerate.parallelism_config import ParallelismConfig

    sizes = _sizes(content)
    if sizes:
        ParallelismConfig(**{f"{axis}_size": sizes.get(axis, 1) for axis in AXES})  # pyright: ignore[reportArgumentType]
    fsdp, dynamo = content.get("fsdp_config") or {}, content.get("dynamo_config") or {}
    kind = str(content.get("distributed_type", "NO")).upper()
    kind = f"FSDP version {fsdp.get('fsdp_version', 1)}" if kind == "FSDP" else kind
    compiles = str(dynamo.get("dynamo_backend", "NO")).upper() != "NO"
    fullgraph = compiles and bool(dynamo.get("dynamo_use_fullgraph"))
    settings = AccelerateSettings(kind, sizes, _precision(content), fullgraph)
    if degree is not None and (why := settings.refusal(degree)) is not None:
        raise ValueError(why)
    return settings


def on_this_machine(settings: Settings, device: str) -> tuple[Settings, list[str]]:
    """The settings of at most MOST_RANKS ranks that train the small model, and how they differ from the user's."""
    plan, changes = cut(settings.plan), []
    if plan != settings.plan:
        if settings.plan.world_size > plan.world_size:
            changes.append(f"{settings.plan.world_size} ranks are cut to {plan.world_size}: {plan.describe()}")
        if settings.plan.cp > 1:
            changes.append(f"cp_size {settings.plan.cp} is left out: each rank trains on whole sequences")
    options = {**vars(settings.options), "moe_ep_degree": plan.ep}
    if device == "cpu" and options["moe_kernel"] not in (*WITHOUT_GPU, "auto"):
        changes.append(f"moe_kernel {options['moe_kernel']} needs a GPU for each rank: auto is trained")
        options["moe_kernel"] = "auto"
    if options["moe_quantize_experts"] != "none":
        changes.append("moe_quantize_experts is left out: whole weights are trained, and compared")
        options["moe_quantize_experts"] = "none"
    if options["moe_dispatch_chunk_tokens"]:
        options["moe_dispatch_chunk_tokens"] = min(5, options["moe_dispatch_chunk_tokens"])  # chunks of the small batch
    return Settings(MoEConfig(**options), plan, settings.checkpointing), changes


def cut(plan: MeshPlan) -> MeshPlan:
    """A mesh of at most MOST_RANKS ranks with the same axes above 1, as far as they fit, and with whole sequences."""
    plan = replace(plan, cp=1)
    if plan.world_size <= MOST_RANKS:
        return plan
    replicate = 2 if plan.dp_replicate > 1 else 1
    shard = min(plan.dp_shard, MOST_RANKS // replicate)
    ep = min(plan.ep, shard)
    if plan.efsdp > 1 and plan.ep > 1 and ep == shard and shard == MOST_RANKS:
        ep = 2
    ep = next(degree for degree in range(ep, 0, -1) if shard % degree == 0)
    return plan_mesh(replicate * shard, ep, dp_replicate=replicate, dp_shard=shard)
