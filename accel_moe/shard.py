"""Experts into shards: whole experts to the ranks of ep, FSDP2 over efsdp, and nothing else touched.

Called inside `accelerator.prepare`, just before accelerate wraps the rest of the model. Each experts module becomes
its own FSDP unit on the efsdp axis of our mesh (unless that axis has size 1: see `shard_experts`), with parameters
that are DTensors sharded on dim 0 over (efsdp, ep); accelerate skips modules that are FSDP units already and shards
the dense weights over all of dp_shard. Names are unchanged, so an optimizer made before finds its parameters again by
name.

Why not earlier: accelerate maps an optimizer's old parameters by data_ptr, and empty shards (2 experts over
efsdp 4) and meta tensors all have data_ptr 0; and accelerate returns at once from a model that is FSDP already.

The order is torchtitan's (models/moe, apply_moe_ep_tp then apply_fsdp): ep first, FSDP over what is left.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from accel_moe.dispatch import make_dispatcher
from accel_moe.experts.layer import ScatterMoE
from accel_moe.experts.state import holds_experts, swapped_layers
from accel_moe.mesh import MeshPlan
from accel_moe.names import plain_name
from accel_moe.patching import ACCELERATE, patch

BROADCAST_BYTES = 256 * 2**20
"""How much of a weight travels from rank 0 at once under fsdp_cpu_ram_efficient_loading."""


def shard_experts(
    model: nn.Module,
    plan: MeshPlan,
    mesh: DeviceMesh,
    *,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: OffloadPolicy | None,
    reshard_after_forward: bool | int,
    upcast: bool,
    from_rank0: bool,
) -> list[nn.Module]:
    """Shard every swapped layer of `model` in place. A collective over the world.

    Where ep covers the whole world (and nothing is offloaded), a rank's experts are its alone: there is nothing to
    gather or to reduce, and FSDP would only copy them twice a step. They stay DTensors of the mesh, for the norm and
    the checkpoint, but FSDP is to ignore them.

    Args:
        mesh: `build_mesh(plan)`.
        mp_policy: accelerate's, for the compute and reduce dtypes. Inputs are not cast and outputs keep their
            dtype: the layer casts hidden_states itself, and fp32 routing weights must stay fp32.
        upcast: make trainable weights fp32 first, as accelerate does under mixed precision.
        from_rank0: only rank 0's values are real (RAM-efficient loading), the others' may be on meta; they are sent to
            them.

    Returns:
        The layers that FSDP has to ignore.
    """
    mp_policy = mp_policy or MixedPrecisionPolicy()
    alone = plan.dp_replicate == plan.efsdp == 1 and not isinstance(offload_policy, CPUOffloadPolicy)
    group = mesh.get_group("ep")
    layers: list[nn.Module] = [layer for _, layer in swapped_layers(model)]
    for layer in layers:
        for name, parameter in list(layer._parameters.items()):
            if parameter is not None:
                dtype = torch.float32 if upcast and parameter.requires_grad else parameter.dtype
                local = _own_experts(parameter, mesh["ep"], dtype, from_rank0)
                if alone:
                    shard = DTensor.from_local(local, mesh["efsdp", "ep"], [Shard(0), Shard(0)], run_check=False)
                else:
                    shard = DTensor.from_local(local, mesh["ep"], [Shard(0)], run_check=False)
                layer.register_parameter(name, nn.Parameter(shard, requires_grad=parameter.requires_grad))
        state = layer._accel_moe_layer
        state.dispatcher = make_dispatcher(state.prepared.config.moe_dispatcher, group, state.num_experts)
        state.prepared.mesh_plan = plan
        if alone:
            state.compute_dtype = mp_policy.param_dtype
            continue
        fully_shard(
            layer,
            mesh=mesh["dp_replicate", "efsdp"] if plan.dp_replicate > 1 else mesh["efsdp"],
            mp_policy=MixedPrecisionPolicy(
                param_dtype=mp_policy.param_dtype,
                reduce_dtype=mp_policy.reduce_dtype,
                output_dtype=None,
                cast_forward_inputs=False,
            ),
            reshard_after_forward=reshard_after_forward,
            **({} if offload_policy is None else {"offload_policy": offload_policy}),
        )
    return layers if alone else []


@torch.no_grad()
def _own_experts(parameter: nn.Parameter, ep_mesh: DeviceMesh, dtype: torch.dtype, from_rank0: bool) -> torch.Tensor:
    """This rank's experts of one weight [E, ...]: [e, ...] in `dtype` on the mesh's device, in memory of its own."""
    device = torch.device(ep_mesh.device_type, torch.cuda.current_device()) if ep_mesh.device_type == "cuda" else "cpu"
    experts = parameter.shape[0] // ep_mesh.size()
    first = ep_mesh.get_local_rank() * experts
    if parameter.is_meta and not from_rank0:  # its values are read into the shard later: load.py
        return torch.empty((experts, *parameter.shape[1:]), dtype=dtype, device="meta")
    if not from_rank0:
        return parameter.detach().narrow(0, first, experts).to(device=device, dtype=dtype, copy=True)
    own = torch.empty((experts, *parameter.shape[1:]), dtype=dtype, device=device)
    at_once = max(1, BROADCAST_BYTES // max(1, parameter[0].numel() * parameter.element_size()))
    for start in range(0, parameter.shape[0], at_once):
        count = min(at_once, parameter.shape[0] - start)
        if dist.get_rank() == 0:
            some = parameter.detach().narrow(0, start, count).to(device).contiguous()
        else:
            some = torch.empty((count, *parameter.shape[1:]), dtype=parameter.dtype, device=device)
        dist.broadcast(some, src=0)
        low, high = max(start, first), min(start + count, first + experts)
        if low < high:
            own[low - first : high - first].copy_(some[low - start : high - start])
    return own


def prefetch_next_layers(model: nn.Module) -> None:
    """Have each decoder layer's forward start the all-gather of the next one's weights; the last layer's, of what
    follows the layers (the final norm, and the head with it, where they are one unit).

    FSDP2 leaves that to the host's running ahead of the GPU, and our layers may make it wait, for their counts: the
    next layer's weights would be asked for when they are needed. Chains are the children of each ModuleList; what is
    not in one, nor just behind one, is left as it was. After torchtitan (models/llama4/infra/parallelize.py,
    apply_fsdp: explicit prefetching where expert parallelism syncs device and host).
    """
    for parent in model.modules():
        children = list(parent.children())
        for at, blocks in enumerate(children):
            if not isinstance(blocks, nn.ModuleList) or not holds_experts(blocks):
                continue
            chain = [[m for m in block.modules() if isinstance(m, FSDPModule)] for block in blocks]
            chain.append([m for m in children[at + 1 :] if isinstance(m, FSDPModule)][:1])
            for units, following in itertools.pairwise(chain):
                if units and following:
                    units[0].set_modules_to_forward_prefetch(following)


class WithoutShardedExperts:
    """A model as `fsdp2_load_full_state_dict` should see it: without the experts.

    That function hands rank 0's whole tensors round, and would shard our shards again. Experts got their values in
    `shard_experts`; they are left out of the state dict it walks through, and put back, as they were before the
    model was moved to meta, into the one it loads.
    """

    def __init__(self, model: nn.Module, full_state_dict: dict[str, torch.Tensor]):
        self._model = model
        owned = {f"{prefix}.{name}" for prefix, layer in swapped_layers(model) for name in layer._parameters}
        self._experts = {key: value for key, value in full_state_dict.items() if plain_name(key) in owned}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self._model.state_dict().items() if key not in self._experts}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], **options):
        return self._model.load_state_dict({**state_dict, **self._experts}, **options)

    def __getattr__(self, name: str):
        return getattr(self._model, name)


def is_sharded(layer: ScatterMoE) -> bool:
    return layer._accel_moe_layer.dispatcher is not None


@patch(
    "accelerate.utils.fsdp_utils.fsdp2_load_full_state_dict",
    why="fsdp_cpu_ram_efficient_loading distributes whole tensors over each parameter's mesh, and would shard a shard "
    "again.",
    tested=ACCELERATE,
)
def fsdp2_load_full_state_dict(original, accelerator, model, full_sd, cpu_offload=False):
    if not any(is_sharded(layer) for _, layer in swapped_layers(model)):
        return original(accelerator, model, full_sd, cpu_offload)
    original(accelerator, WithoutShardedExperts(model, full_sd), full_sd, cpu_offload)
    return model
