"""Experts become shards: each rank of ep gets whole experts, FSDP2 shards them further over efsdp.

in_accelerator.py calls this inside `accelerator.prepare`, just before accelerate wraps the rest of the model. Each
experts module becomes an FSDP unit of its own on the efsdp axis of our mesh, unless ep spans the world. Its parameters
are DTensors, sharded on dim 0 over (efsdp, ep). accelerate skips modules that are FSDP units already, and shards the
dense weights over all of dp_shard. Names are unchanged, so an optimizer that was made before finds its parameters
again by name.

Sharding earlier would fail. accelerate maps an optimizer's old parameters by data_ptr, and empty shards (2 experts over
efsdp 4) and meta tensors all have data_ptr 0. And accelerate returns at once from a model that is FSDP already.

The order is torchtitan's (models/moe, apply_moe_ep_tp then apply_fsdp): ep first, FSDP over the ranks that are left.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from accel_moe.dispatch import make_dispatcher
from accel_moe.dispatch.local import NotSharded
from accel_moe.experts.in_graph import handle_of
from accel_moe.experts.layer import ScatterMoE
from accel_moe.experts.state import holds_experts, swapped_layers
from accel_moe.mesh import MeshPlan
from accel_moe.names import plain_name
from accel_moe.patching import ACCELERATE, patch

BROADCAST_BYTES = 256 * 2**20
"""Bytes of a weight that rank 0 sends at once under fsdp_cpu_ram_efficient_loading."""


@dataclass(frozen=True)
class FsdpSettings:
    """accelerate's settings of FSDP, for the experts.

    Attributes:
        mp_policy: the compute and reduce dtypes. Inputs are not cast and outputs keep their dtype: the layer casts
            hidden_states itself, and fp32 routing weights must stay fp32.
        upcast: make trainable weights fp32 first, as accelerate does under mixed precision.
        from_rank0: only rank 0's values are real (RAM-efficient loading), and rank 0 sends them; the others' may be on
            meta.
    """

    mp_policy: MixedPrecisionPolicy
    offload_policy: OffloadPolicy | None
    reshard_after_forward: bool | int
    upcast: bool
    from_rank0: bool


def shard_experts(model: nn.Module, plan: MeshPlan, mesh: DeviceMesh, fsdp: FsdpSettings) -> list[nn.Module]:
    """Shard every swapped layer of `model` in place. A collective over the world.

    When ep spans the world and nothing is offloaded, no other rank holds the same experts: FSDP has nothing to gather
    or reduce, so it ignores them. They are DTensors over the mesh all the same, for the norm and the checkpoint.

    Args:
        mesh: `build_mesh(plan)`.

    Returns:
        The layers that FSDP has to ignore.
    """
    ep_spans_world = fsdp_ignores_experts(plan, fsdp.offload_policy)
    axes = ("efsdp", "ep") if ep_spans_world else ("ep",)
    layers: list[nn.Module] = [layer for _, layer in swapped_layers(model)]
    for layer in layers:
        for name, parameter in list(layer._parameters.items()):
            if parameter is not None:
                layer.register_parameter(name, _over_ep(parameter, mesh, axes, fsdp))
        state = layer._accel_moe_layer
        kind = state.prepared.config.moe_dispatcher
        state.dispatcher = make_dispatcher(kind, mesh.get_group("ep"), state.num_experts)
        state.prepared.mesh_plan = plan
        if ep_spans_world:
            state.fsdp_ignores_it, state.handle = True, handle_of(layer)
            state.compute_dtype = fsdp.mp_policy.param_dtype
        else:
            _make_fsdp_unit(layer, mesh["dp_replicate", "efsdp"] if plan.dp_replicate > 1 else mesh["efsdp"], fsdp)
    return layers if ep_spans_world else []


def fsdp_ignores_experts(plan: MeshPlan, offload_policy: OffloadPolicy | None) -> bool:
    return plan.dp_replicate == plan.efsdp == 1 and not isinstance(offload_policy, CPUOffloadPolicy)


def _over_ep(parameter: nn.Parameter, mesh: DeviceMesh, axes: tuple[str, ...], fsdp: FsdpSettings) -> nn.Parameter:
    """One weight [E, ...] as a DTensor over `axes`, sharded on dim 0; only ep may be larger than 1 among them."""
    dtype = torch.float32 if fsdp.upcast and parameter.requires_grad else parameter.dtype
    local = _own_experts(parameter, mesh["ep"], dtype, fsdp.from_rank0)
    shard = DTensor.from_local(local, mesh[axes], [Shard(0)] * len(axes), run_check=False)
    return nn.Parameter(shard, requires_grad=parameter.requires_grad)


def _make_fsdp_unit(layer: nn.Module, mesh: DeviceMesh, fsdp: FsdpSettings) -> None:
    fully_shard(
        layer,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=fsdp.mp_policy.param_dtype,
            reduce_dtype=fsdp.mp_policy.reduce_dtype,
            output_dtype=None,
            cast_forward_inputs=False,
        ),
        reshard_after_forward=fsdp.reshard_after_forward,
        **({} if fsdp.offload_policy is None else {"offload_policy": fsdp.offload_policy}),
    )


@torch.no_grad()
def _own_experts(parameter: nn.Parameter, ep_mesh: DeviceMesh, dtype: torch.dtype, from_rank0: bool) -> torch.Tensor:
    """This rank's experts of one weight [E, ...]: [e, ...] in `dtype` on the mesh's device, in memory of its own."""
    device = torch.device(ep_mesh.device_type, torch.cuda.current_device()) if ep_mesh.device_type == "cuda" else "cpu"
    experts = parameter.shape[0] // ep_mesh.size()
    first = ep_mesh.get_local_rank() * experts
    if parameter.is_meta and not from_rank0:  # its values are read into the shard later: weights/fill.py
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
    """Have each decoder layer's forward start the all-gather of the next layer's weights.

    The last layer's forward starts that of the unit behind the layers (the final norm; the head with it, where they are
    one unit). FSDP2 counts on a host that runs ahead of the GPU, and our layers may make the host wait for their
    counts: the next weights would be asked for only when they are needed. Each ModuleList is one chain; a unit that is
    neither in one nor just behind one is left as it was. After torchtitan (models/llama4/infra/parallelize.py,
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
    """A model without the experts, for `fsdp2_load_full_state_dict`.

    That function sends rank 0's whole tensors to all ranks, and would shard our shards again. `shard_experts` gave the
    experts their values already. They are left out of the state dict that the function walks through, and put back into
    the one that it loads, as they were before the model was moved to meta.
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
    state = layer._accel_moe_layer
    return state.ep > 1 and not isinstance(state.dispatcher, NotSharded)


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
