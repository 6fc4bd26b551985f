"""The second half of `prepare()`, which runs inside `accelerator.prepare`, in two steps around accelerate's own.

    accelerator.prepare     compare the ranks; check forwards and settings; adapt PEFT's wrappers         collective
    fsdp2_prepare_model     plan the mesh, shard the experts, let FSDP2 wrap the rest, read the values    collective

A model that accel_moe did not prepare, and that has no load plan, passes through.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from accel_moe import long_context, mesh, positions, ranks, recompute, ring_limits, shard, whereabouts
from accel_moe.accelerate_settings import AccelerateSettings
from accel_moe.agreement import compare_ranks
from accel_moe.experts import forwards
from accel_moe.experts.adapters import adopt_adapters, patch_peft
from accel_moe.experts.pack import check_packable, pack_experts
from accel_moe.experts.recognise import find_experts
from accel_moe.experts.state import PreparedState, prepared_state
from accel_moe.names import plain_name
from accel_moe.patching import ACCELERATE, patch
from accel_moe.weights.fill import fill, share_real
from accel_moe.weights.plan import check_together, pending, settle

logger = logging.getLogger("accel_moe")


@patch(
    "accelerate.Accelerator.prepare",
    why="A model marked for ep > 1 that does not take the FSDP2 road (DDP, FSDP1, DeepSpeed) would train whole experts "
    "on every rank without a word; and the ranks' settings and models are compared before any collective.",
    tested=ACCELERATE,
)
def prepare(original, self, *args, device_placement=None):
    patch_peft()  # PEFT may have been imported since accel_moe.prepare()
    for model in args:
        if isinstance(model, nn.Module) and (state := prepared_state(model)) is not None:
            compare_ranks(model, state)
            if (size := long_context.cp_size(self)) > 1:
                ring_limits.check_model(model, size)
            look = partial(forwards.take_back, model)
            ranks.run_or_raise_everywhere("accelerator.prepare", look, ValueError, over=dist.group.WORLD)
            if state.config.moe_ep_degree > 1:
                _check_accelerator(self, state)
                adopt_adapters(find_experts(model))  # PEFT may have wrapped the experts since prepare()
            if state.quantize is not None:
                _prepare_to_pack(self, model, state)
    with _models_on_meta(self, args):
        return original(self, *args, device_placement=device_placement)


@patch(
    "accelerate.accelerator.fsdp2_prepare_model",
    why="The one moment between activation checkpointing and wrapping, after the optimizer's parameters were noted by "
    "name. accelerate offers no hook there. The name is patched where it is called: accelerate.accelerator imports it.",
    tested=ACCELERATE,
)
def fsdp2_prepare_model(original, accelerator, model):
    state = prepared_state(model)
    with _values_from_files(accelerator, model):
        if state is not None and long_context.cp_size(accelerator) > 1:
            long_context.watch(model)
            if state.config.moe_ep_degree == 1:  # else _shard does
                positions.trust_own_positions(model)
        if state is None or state.config.moe_ep_degree == 1 or state.mesh_plan is not None:
            model = original(accelerator, model)
        else:
            with _ignoring(accelerator, model, _shard(accelerator, model, state)):
                model = original(accelerator, model)
            shard.prefetch_next_layers(model)
    if state is not None:
        _watch(accelerator, model)
        _generate_together(model)
    return model


@contextmanager
def _values_from_files(accelerator, model: nn.Module) -> Iterator[None]:
    """Around the sharding of a model with a load plan: it is sharded on meta, and then its values are read."""
    waiting = pending(model)
    if waiting is None:
        yield
        return
    plugin = accelerator.state.fsdp_plugin
    settle(model)
    pack_experts(model, prepared_state(model), accelerator.device)
    share_real(model, accelerator.device)
    ram_efficient, plugin.cpu_ram_efficient_loading = plugin.cpu_ram_efficient_loading, False  # rank 0 has no values
    try:
        yield
    finally:
        plugin.cpu_ram_efficient_loading = ram_efficient
    offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    fill(model, torch.device("cpu") if offloaded else accelerator.device)


@contextmanager
def _models_on_meta(accelerator, args: tuple[Any, ...]) -> Iterator[None]:
    """Around Accelerator.prepare: models with a load plan are checked, and optimizers find their new parameters.

    accelerate finds an optimizer's new parameters by data_ptr, which is 0 for everything on meta; here they are put
    back by name. Without FSDP2 a model with a load plan is loaded whole, first.
    """
    models = [arg for arg in args if isinstance(arg, nn.Module)]
    planned = [model for model in models if pending(model) is not None]
    optimizers = [arg for arg in args if isinstance(arg, torch.optim.Optimizer)]
    check_together(models, optimizers)
    if not accelerator.is_fsdp2:
        for model in planned:
            state = prepared_state(model)
            packs = state is not None and state.quantize is not None and accelerator.device_placement
            fill(model, accelerator.device if packs else torch.device("cpu"))  # packing is slow on the CPU
    models = [m for m in models if accelerator.is_fsdp2 and any(p.is_meta for p in m.parameters())]
    names = {id(p): plain_name(name) for model in models for name, p in model.named_parameters()}
    optimizers = optimizers if models else []
    before = [[[names.get(id(p)) for p in g["params"]] for g in o.param_groups] for o in optimizers]
    yield
    after = {plain_name(name): p for model in models for name, p in model.named_parameters()}
    for optimizer, groups in zip(optimizers, before):
        for group, group_names in zip(optimizer.param_groups, groups):
            group["params"] = [p if n is None else after[n] for n, p in zip(group_names, group["params"])]


def _check_accelerator(accelerator, state: PreparedState) -> None:
    degree = state.config.moe_ep_degree
    source = state.resolved.sources["moe_ep_degree"]
    found = f"moe_ep_degree={degree} ({source})"
    dynamo, parallelism = accelerator.state.dynamo_plugin, accelerator.parallelism_config
    sizes = {axis: getattr(parallelism, f"{axis}_size", 1) or 1 for axis in ("tp", "sp", "cp")}
    fullgraph = dynamo.backend.value != "NO" and bool(dynamo.fullgraph)
    offloads = accelerator.is_fsdp2 and isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    backends = dist.get_backend_config() if offloads else ""
    settings = AccelerateSettings(_kind(accelerator), sizes, accelerator.mixed_precision, fullgraph, backends)
    if (why := settings.refusal(found)) is not None:
        raise ValueError(why)
    plan = _plan(accelerator, state)
    if not fullgraph:
        return
    if not shard.fsdp_ignores_experts(plan, accelerator.state.fsdp_plugin.cpu_offload):
        raise ValueError(
            f"{found} with dynamo_use_fullgraph: true is not supported over {plan.describe()}: FSDP gathers the "
            "experts in hooks of its own, or offloads them, and the graph breaks there. Set moe_ep_degree to the "
            "number of ranks and offload nothing, or set dynamo_config.dynamo_use_fullgraph: false."
        )
    if not dynamo.use_regional_compilation:
        raise ValueError(
            f"{found} with dynamo_use_fullgraph: true needs dynamo_use_regional_compilation: true: FSDP's hooks break "
            "the graph of a whole model. Set it, or set dynamo_config.dynamo_use_fullgraph: false."
        )


def _prepare_to_pack(accelerator, model: nn.Module, state: PreparedState) -> None:
    """Check what `moe_quantize_experts` needs, and pack a model that is in memory. A collective.

    Raises:
        ValueError: on every rank, if one of them cannot pack its experts.
    """
    if accelerator.distributed_type.value in ("DEEPSPEED", "MEGATRON_LM") or (
        accelerator.distributed_type.value == "FSDP" and not accelerator.is_fsdp2
    ):
        found = f"moe_quantize_experts={state.quantize} ({state.resolved.sources['moe_quantize_experts']})"
        raise ValueError(
            f"{found} needs FSDP2, DDP or one process, but this Accelerator runs {_kind(accelerator)}. Set "
            "distributed_type: FSDP and fsdp_config.fsdp_version: 2 in the accelerate config, or remove "
            "moe_quantize_experts."
        )
    check = partial(check_packable, model, state, accelerator.device)
    ranks.run_or_raise_everywhere("accelerator.prepare", check, ValueError, over=dist.group.WORLD)
    adopt_adapters(find_experts(model), "moe_quantize_experts")
    if pending(model) is None:
        pack_experts(model, state, accelerator.device)


def _kind(accelerator) -> str:
    kind = accelerator.distributed_type.value
    return f"FSDP version {2 if accelerator.is_fsdp2 else 1}" if kind == "FSDP" else kind


def _plan(accelerator, state: PreparedState) -> mesh.MeshPlan:
    parallelism = accelerator.parallelism_config
    has_mesh = parallelism is not None and getattr(accelerator, "torch_device_mesh", None) is not None
    return mesh.plan_mesh(
        accelerator.num_processes,
        state.config.moe_ep_degree,
        dp_replicate=(parallelism.dp_replicate_size or 1) if has_mesh else 1,
        dp_shard=(parallelism.dp_shard_size or 1) if has_mesh else None,
        cp=long_context.cp_size(accelerator),
    )


def _watch(accelerator, model: nn.Module) -> None:
    """Watch the model's forwards: each is a collective of the ranks that share one replica."""
    parallelism = accelerator.parallelism_config
    size = accelerator.num_processes // ((parallelism.dp_replicate_size or 1) if parallelism is not None else 1)
    first = accelerator.process_index // size * size
    whereabouts.watch(model, range(first, first + size))
    whereabouts.watch_the_end()


def _generate_together(model: nn.Module) -> None:
    """`generate` goes on, by default, until the last rank has its last token: each of its forwards is a collective.

    transformers asks this of the models that it shards itself, and knows them by an attribute.
    """
    for module in model.modules():
        if hasattr(module, "generate"):
            module._is_fsdp_managed_module = True


def _log_plan(plan: mesh.MeshPlan) -> None:
    if not ranks.is_rank0():
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
    """Shard the experts; returns the layers that FSDP has to ignore."""
    plugin = accelerator.state.fsdp_plugin
    plan = _plan(accelerator, state)
    _log_plan(plan)
    recompute.keep_random_numbers(model)
    if state.config.moe_keep_exchanged:
        recompute.keep_exchanges(model)
    positions.trust_own_positions(model)
    settings = shard.FsdpSettings(
        mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        offload_policy=plugin.cpu_offload,
        reshard_after_forward=plugin.reshard_after_forward,
        upcast=accelerator.mixed_precision != "no",
        from_rank0=plugin.cpu_ram_efficient_loading,
    )
    return shard.shard_experts(model, plan, mesh.build_mesh(plan, accelerator.device.type), settings)
