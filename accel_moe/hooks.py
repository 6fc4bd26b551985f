"""The only file that assigns into accelerate or transformers: a table of patches, each on a leash.

A row names its target, the parameters that the target had in the versions it was tested with, and why there is no
hook or public API to use instead. Installing checks every row's parameters first, and refuses loudly if they moved. A
newer version than was tested, whose targets have not moved, is a warning. `uninstall` puts everything back. Nothing is
patched at import: `prepare()` installs `TABLE`, `accel_moe.cpu.enable()` installs `CPU_TABLE`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accel_moe import dtype_units, mesh, positions, recompute, shard, supported, whereabouts
from accel_moe.agreement import compare_ranks
from accel_moe.checkpoint.hooked import HOOKED as CHECKPOINT_ROWS
from accel_moe.experts import forwards
from accel_moe.experts.adapters import adopt_adapters, adopting
from accel_moe.experts.recognise import find_experts
from accel_moe.experts.state import PreparedState, prepared_state, swapped_layers
from accel_moe.names import plain_name
from accel_moe.weights import edits, fill, plan

logger = logging.getLogger("accel_moe")


@dataclass(frozen=True)
class Patch:
    """One row.

    Attributes:
        target: dotted path; the last part is the attribute that is replaced.
        parameters: the target's own, in order, in the tested versions.
        wrapper: (original) -> replacement.
        reason: why it is patched, for the reader and for the error.
        tested: the versions it was run with (supported.py).
    """

    target: str
    parameters: tuple[str, ...]
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
    reason: str
    tested: str = supported.words("accelerate")


def shard_then_prepare(original):
    @functools.wraps(original)
    def fsdp2_prepare_model(accelerator, model):
        state = prepared_state(model)
        with _values_from_files(accelerator, model):
            if state is None or state.config.moe_ep_degree == 1 or state.mesh_plan is not None:
                model = original(accelerator, model)
            else:
                with _ignoring(accelerator, model, _shard(accelerator, model, state)):
                    model = original(accelerator, model)
                shard.prefetch_next_layers(model)
        if state is not None:
            _watch(accelerator, model)
        return model

    return fsdp2_prepare_model


def units_of_one_dtype(original):
    @functools.wraps(original)
    def fsdp2_prepare_auto_wrap_policy(fsdp2_plugin, model):
        policy = original(fsdp2_plugin, model)
        if prepared_state(model) is None:
            return policy
        return dtype_units.units_of_one_dtype(model, policy, _ignored_parameters(fsdp2_plugin, model))

    return fsdp2_prepare_auto_wrap_policy


def leave_experts_out(original):
    @functools.wraps(original)
    def fsdp2_load_full_state_dict(accelerator, model, full_sd, cpu_offload=False):
        if not any(shard.is_sharded(layer) for _, layer in swapped_layers(model)):
            return original(accelerator, model, full_sd, cpu_offload)
        original(accelerator, shard.WithoutShardedExperts(model, full_sd), full_sd, cpu_offload)
        return model

    return fsdp2_load_full_state_dict


def check_then_prepare(original):
    @functools.wraps(original)
    def prepare(self, *args, device_placement=None):
        install()  # PEFT may have been imported since accel_moe.prepare()
        for model in args:
            if isinstance(model, nn.Module) and (state := prepared_state(model)) is not None:
                compare_ranks(model, state)
                _check_forwards(model)
                if state.config.moe_ep_degree > 1:
                    _check_accelerator(self, model, state)
                    adopt_adapters(find_experts(model))  # PEFT may have wrapped the experts since prepare()
        with _models_on_meta(self, args):
            return original(self, *args, device_placement=device_placement)

    return prepare


def compile_inside_checkpoints(original):
    @functools.wraps(original)
    def compile_regions_fsdp2(module, **compile_kwargs):
        state = prepared_state(module)
        if state is None or state.config.moe_ep_degree == 1:
            return original(module, **compile_kwargs)
        with recompute.compiled_inside(module):
            return original(module, **compile_kwargs)

    return compile_regions_fsdp2


def has_accelerator() -> bool:
    """Whether there is a device that FSDP can use. Apple's MPS has no collectives: such a machine runs on its CPU."""
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != "mps"


def gloo_when_no_accelerator(original):
    @functools.wraps(original)
    def _prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        from accelerate.utils import DistributedType

        launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
        if launched and not cpu and not sagemaker_dp and not has_accelerator():
            return "gloo", DistributedType.MULTI_GPU
        return original(self, cpu, sagemaker_dp, backend)

    return _prepare_backend


def plan_instead_of_reading(original):
    @functools.wraps(original)
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        return plan.make_plan(original, model, checkpoint_files, load_config)

    return staticmethod(_load_pretrained_model)


TABLE = (
    Patch(
        "accelerate.Accelerator.prepare",
        ("self", "args", "device_placement"),
        check_then_prepare,
        "A model marked for ep > 1 that does not take the FSDP2 road (DDP, FSDP1, DeepSpeed) would train whole "
        "experts on every rank without a word; and the ranks' settings and models are compared before any collective.",
    ),
    Patch(
        "accelerate.accelerator.fsdp2_prepare_model",
        ("accelerator", "model"),
        shard_then_prepare,
        "The one moment between activation checkpointing and wrapping, after the optimizer's parameters were noted "
        "by name. accelerate offers no hook there. The name is patched where it is called: accelerate.accelerator "
        "imports it.",
    ),
    Patch(
        "accelerate.utils.fsdp_utils.fsdp2_prepare_auto_wrap_policy",
        ("fsdp2_plugin", "model"),
        units_of_one_dtype,
        "FSDP2 refuses trained parameters of two dtypes in one unit, such as fp32 routers in a bf16 model. The policy "
        "is where accelerate decides on units; a policy of the user's own would replace that of the decoder layers.",
    ),
    Patch(
        "accelerate.utils.fsdp_utils.fsdp2_load_full_state_dict",
        ("accelerator", "model", "full_sd", "cpu_offload"),
        leave_experts_out,
        "fsdp_cpu_ram_efficient_loading distributes whole tensors over each parameter's mesh, and would shard a "
        "shard again.",
    ),
    Patch(
        "accelerate.accelerator.compile_regions_fsdp2",
        ("module", "compile_kwargs"),
        compile_inside_checkpoints,
        "It compiles a checkpointed layer from outside, where the graph cannot break for the exchange: such layers "
        "would run uncompiled.",
    ),
    Patch(
        "transformers.masking_utils.find_packed_sequence_indices",
        ("position_ids",),
        positions.asking_once,
        "It asks the GPU in every forward whether the positions are those of packed sequences, also where the model "
        "has just counted them; the host waits for the whole step before.",
        supported.words("transformers"),
    ),
    Patch(
        "accelerate.Accelerator.wait_for_everyone",
        ("self",),
        whereabouts.wrap_wait_for_everyone,
        "A rank that skipped a call of all ranks often waits here: those that made the call are told so.",
    ),
    Patch(
        "accelerate.Accelerator.get_state_dict",
        ("self", "model", "unwrap"),
        whereabouts.wrap_get_state_dict,
        "It gathers a sharded model's weights, and hangs without a word where one rank alone calls it.",
    ),
    *(Patch(*row) for row in CHECKPOINT_ROWS),
)

CPU_TABLE = (
    Patch(
        "accelerate.state.PartialState._prepare_backend",
        ("self", "cpu", "sagemaker_dp", "backend"),
        gloo_when_no_accelerator,
        "accelerate ties FSDP to a GPU backend; FSDP2 itself runs on gloo.",
    ),
)

LOAD_TABLE = (
    Patch(
        "transformers.PreTrainedModel._load_pretrained_model",
        ("model", "state_dict", "checkpoint_files", "load_config", "expected_keys"),
        plan_instead_of_reading,
        "accel_moe.from_pretrained is transformers' own, up to the reading: it has resolved the files, the dtype and "
        "the conversions by then, and offers no hook to stop there. In place only while from_pretrained runs.",
        supported.words("transformers"),
    ),
)

PEFT_TABLE = (
    Patch(
        "peft.tuners.lora.layer.ParamWrapper._activate_lora",
        ("self", "active_adapters"),
        adopting,
        "PEFT may wrap experts after they were sharded, and its parametrisation then adds a whole matrix to a shard.",
        "peft 0.21.2",
    ),
)
"""In place where PEFT was imported; its older versions have no ParamWrapper."""

_originals: dict[str, Any] = {}


def install() -> None:
    """Put every row of TABLE in place; a second call changes nothing. Warns once of versions that were not tested.

    Raises:
        RuntimeError: a target is gone or takes other parameters than it did in the tested versions. No row is in place
            then.
    """
    for patch in TABLE:
        _refuse_off_leash(patch)
    _warn_of_untested_versions()
    for patch in TABLE:
        _install(patch)
    if hasattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper"):
        for patch in PEFT_TABLE:
            _install(patch)


def install_cpu() -> None:
    for patch in CPU_TABLE:
        _install(patch)


@contextmanager
def planning_loads() -> Iterator[None]:
    """Within it, from_pretrained leaves its model on meta, with a load plan."""
    try:
        for patch in LOAD_TABLE:
            _install(patch)
        yield
    finally:
        for patch in LOAD_TABLE:
            _uninstall(patch.target)


def uninstall() -> None:
    """Undo every patch, newest first."""
    for target in reversed(list(_originals)):
        _uninstall(target)


def _uninstall(target: str) -> None:
    if target in _originals:
        owner, name = _locate(target)
        setattr(owner, name, _originals.pop(target))


def installed() -> list[str]:
    return list(_originals)


def off_leash(patch: Patch) -> str | None:
    """Why the patch does not fit what is installed here, or None. One that is in place is seen through."""
    try:
        owner, name = _locate(patch.target)
        found = _parameters_of(getattr(owner, name))
    except LookupError:
        moved = "which this version does not have"
    except TypeError:
        moved = "which is no function here"
    else:
        if found == patch.parameters:
            return None
        moved = f"and found it with parameters {found} where it expected {patch.parameters}"
    package = patch.target.split(".")[0]
    return (
        f"accel_moe patches {patch.target}, {moved} ({package} {supported.installed(package)}; tested with "
        f"{patch.tested}). Install a tested version, or update accel_moe. What the patch is for: {patch.reason}"
    )


def _refuse_off_leash(patch: Patch) -> None:
    if (why := off_leash(patch)) is not None:
        raise RuntimeError(why)


@functools.cache
def _warn_of_untested_versions() -> None:
    if int(os.environ.get("RANK", 0)) == 0 and (message := supported.warning()) is not None:
        logger.warning(message)


def _install(patch: Patch) -> None:
    if patch.target in _originals:
        return
    _refuse_off_leash(patch)
    owner, name = _locate(patch.target)
    _originals[patch.target] = inspect.getattr_static(owner, name)  # a static method must come back as one
    setattr(owner, name, patch.wrapper(getattr(owner, name)))


def _parameters_of(function: Any) -> tuple[str, ...]:
    """The names of a function's parameters; of one written in C++, those that pybind's docstring begins with."""
    try:
        return tuple(inspect.signature(function).parameters)
    except ValueError:
        listed = re.match(r"\w+\((.*?)\)", function.__doc__ or "")
        return tuple(part.partition(":")[0].strip() for part in listed[1].split(",")) if listed else ()


def _locate(target: str) -> tuple[Any, str]:
    """The object that holds the attribute, and its name: modules first, then attributes of the module.

    Raises LookupError if there is none.
    """
    *path, name = target.split(".")
    for cut in range(len(path), 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(path[:cut]))
        except ModuleNotFoundError:
            continue
        for part in path[cut:]:
            owner = getattr(owner, part, None)
        if hasattr(owner, name):
            return owner, name
        break
    raise LookupError(target)


def _check_forwards(model: nn.Module) -> None:
    error = None
    try:
        forwards.take_back(model)
    except ValueError as problem:
        error = problem
    edits.check_ranks({}, error)


@contextmanager
def _values_from_files(accelerator, model: nn.Module) -> Iterator[None]:
    """Around the sharding of a model with a load plan: everything is sharded on meta, then the values are read."""
    waiting = plan.pending(model)
    if waiting is None:
        yield
        return
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = accelerator.state.fsdp_plugin
    plan.settle(model)
    fill.share_real(model, accelerator.device)
    ram_efficient, plugin.cpu_ram_efficient_loading = plugin.cpu_ram_efficient_loading, False  # rank 0 has no values
    try:
        yield
    finally:
        plugin.cpu_ram_efficient_loading = ram_efficient
    offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    fill.fill(model, torch.device("cpu") if offloaded else accelerator.device)


@contextmanager
def _models_on_meta(accelerator, args: tuple[Any, ...]) -> Iterator[None]:
    """Around Accelerator.prepare: models with a load plan are checked, and those on meta keep their optimizers.

    accelerate finds an optimizer's new parameters by data_ptr, which is 0 for everything on meta; here they are put
    back by name. Off the FSDP2 road a planned model is loaded whole, first.
    """
    models = [arg for arg in args if isinstance(arg, nn.Module)]
    planned = [model for model in models if plan.pending(model) is not None]
    optimizers = [arg for arg in args if isinstance(arg, torch.optim.Optimizer)]
    plan.check_together(models, optimizers)
    if not accelerator.is_fsdp2:
        for model in planned:
            fill.fill(model, torch.device("cpu"))
    models = [m for m in models if accelerator.is_fsdp2 and any(p.is_meta for p in m.parameters())]
    names = {id(p): plain_name(name) for model in models for name, p in model.named_parameters()}
    optimizers = optimizers if models else []
    before = [[[names.get(id(p)) for p in g["params"]] for g in o.param_groups] for o in optimizers]
    yield
    after = {plain_name(name): p for model in models for name, p in model.named_parameters()}
    for optimizer, groups in zip(optimizers, before):
        for group, group_names in zip(optimizer.param_groups, groups):
            group["params"] = [p if n is None else after[n] for n, p in zip(group_names, group["params"])]


def _check_accelerator(accelerator, model: nn.Module, state: PreparedState) -> None:
    degree = state.config.moe_ep_degree
    source = state.resolved.sources["moe_ep_degree"]
    found = f"moe_ep_degree={degree} ({source})"
    if not accelerator.is_fsdp2:
        kind = accelerator.distributed_type.value
        if kind == "FSDP":
            kind = "FSDP version 1"
        raise ValueError(
            f"{found} needs FSDP2, but this Accelerator runs {kind}. Set distributed_type: FSDP and "
            "fsdp_config.fsdp_version: 2 in the accelerate config, or remove moe_ep_degree."
        )
    parallelism = accelerator.parallelism_config
    for axis in ("tp", "cp", "sp"):
        size = getattr(parallelism, f"{axis}_size", 1) or 1 if parallelism is not None else 1
        if size > 1:
            raise ValueError(
                f"{found} together with {axis}_size={size} is not supported. Set parallelism_config_{axis}_size: 1, or "
                "remove moe_ep_degree."
            )
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            f"{found} with mixed_precision: fp16 is not supported: the gradient scaler looks for overflow on each "
            "parameter's own mesh only. Use mixed_precision: bf16."
        )
    dynamo = accelerator.state.dynamo_plugin
    if dynamo.backend.value != "NO" and dynamo.fullgraph:
        raise ValueError(
            f"{found} with dynamo_use_fullgraph: true is not supported: the graph breaks where ranks exchange tokens. "
            "Set dynamo_config.dynamo_use_fullgraph: false."
        )
    _plan(accelerator, state)


def _plan(accelerator, state: PreparedState) -> mesh.MeshPlan:
    parallelism = accelerator.parallelism_config
    has_mesh = parallelism is not None and getattr(accelerator, "torch_device_mesh", None) is not None
    return mesh.plan_mesh(
        accelerator.num_processes,
        state.config.moe_ep_degree,
        dp_replicate=(parallelism.dp_replicate_size or 1) if has_mesh else 1,
        dp_shard=(parallelism.dp_shard_size or 1) if has_mesh else None,
    )


def _watch(accelerator, model: nn.Module) -> None:
    """A forward is a collective of the ranks that share one replica."""
    parallelism = accelerator.parallelism_config
    size = accelerator.num_processes // ((parallelism.dp_replicate_size or 1) if parallelism is not None else 1)
    first = accelerator.process_index // size * size
    whereabouts.watch(model, range(first, first + size))
    whereabouts.watch_the_end()


def _log_plan(plan: mesh.MeshPlan) -> None:
    if torch.distributed.get_rank():
        return
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", plan.world_size))
    nodes = plan.nodes_per_ep_group(local_world_size)
    logger.info("experts sharded over %s", plan.describe())
    if nodes > 1:
        logger.warning(
            "an ep group spans %d nodes (moe_ep_degree=%d, %d ranks a node): about %d of %d rows leave their node in "
            "every dispatch and combine. moe_ep_degree=%d would keep them on one.",
            nodes,
            plan.ep,
            local_world_size,
            nodes - 1,
            nodes,
            math.gcd(plan.ep, local_world_size),
        )


def _ignored_parameters(plugin, model: nn.Module) -> set[nn.Parameter]:
    modules = plugin.ignored_modules or []
    if isinstance(modules, str):
        modules = [module for name, module in model.named_modules() if re.fullmatch(plugin.ignored_modules, name)]
    return {parameter for module in modules for parameter in module.parameters()}


@contextmanager
def _ignoring(accelerator, model: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """Within it, accelerate leaves `layers` out of FSDP, beside what its fsdp_ignored_modules names."""
    plugin = accelerator.state.fsdp_plugin
    before = plugin.ignored_modules
    if layers:
        if isinstance(before, str):
            named = [module for name, module in model.named_modules() if re.fullmatch(before, name)]
            plugin.ignored_modules = [*(module.to(accelerator.device) for module in named), *layers]
        else:
            plugin.ignored_modules = [*(before or []), *layers]
    try:
        yield
    finally:
        plugin.ignored_modules = before


def _shard(accelerator, model: nn.Module, state: PreparedState) -> list[nn.Module]:
    """Shard the experts; returns the layers that FSDP is to ignore."""
    plugin = accelerator.state.fsdp_plugin
    plan = _plan(accelerator, state)
    _log_plan(plan)
    recompute.keep_random_numbers(model)
    if state.config.moe_keep_exchanged:
        recompute.keep_exchanges(model)
    positions.trust_own_positions(model)
    return shard.shard_experts(
        model,
        plan,
        mesh.build_mesh(plan, accelerator.device.type),
        mp_policy=plugin.mixed_precision_policy,
        offload_policy=plugin.cpu_offload,
        reshard_after_forward=plugin.reshard_after_forward,
        upcast=accelerator.mixed_precision != "no",
        from_rank0=plugin.cpu_ram_efficient_loading,
    )
