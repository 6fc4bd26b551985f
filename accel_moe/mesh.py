"""The mesh: which rank holds which experts. `plan_mesh` is arithmetic; `build_mesh` makes the DeviceMesh.

A job of `world` ranks is cut three ways, outermost first:

    (dp_replicate, efsdp, ep)        efsdp x ep = dp_shard x cp

* `dp_replicate`: whole copies of the model (HSDP); 1 without HSDP.
* `ep`: the ranks that share one set of experts. Each holds `num_experts / ep` whole experts, and tokens travel between
  them. It is the innermost axis: an ep group has neighbouring ranks, which a launcher places on one node first.
* `efsdp`: the ranks that hold the same experts and shard them as FSDP does.

accelerate shards dense weights over all ranks of one copy: `dp_shard`, joined with the `cp` ranks that share a sequence
under context parallelism. Experts see tokens and no sequences, so an ep group crosses both. All meshes number the ranks
alike (accelerate puts dp_replicate outside dp_shard and cp inside, PyTorch numbers row-major), so one gradient norm can
be taken over all.

`plan_mesh` is pure and runs on a laptop. `build_mesh` is a collective.

Source of the axes' names and order: torchtitan, distributed/parallel_dims.py.
"""

from __future__ import annotations

import datetime
import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

MESH_DIM_NAMES = ("dp_replicate", "efsdp", "ep")


@dataclass(frozen=True)
class MeshPlan:
    """The sizes of the three axes, checked by `plan_mesh`. Build it only there.

    Attributes:
        cp: how many neighbouring ranks share each sequence. It is no axis of its own: it lies across efsdp and ep.
    """

    dp_replicate: int
    efsdp: int
    ep: int
    cp: int = 1

    @property
    def fsdp_ranks(self) -> int:
        """The ranks that share one copy of the weights: dp_shard x cp."""
        return self.efsdp * self.ep

    @property
    def dp_shard(self) -> int:
        """accelerate's dp_shard_size: the batches that one copy of the weights trains on at a time."""
        return self.fsdp_ranks // self.cp

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.efsdp * self.ep

    def ep_group_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that exchange tokens with `rank`, including itself, in ep order."""
        first = rank - rank % self.ep
        return tuple(range(first, first + self.ep))

    def nodes_per_ep_group(self, local_world_size: int) -> int:
        """The number of nodes of the widest ep group, with `local_world_size` ranks on each node."""
        return max(
            len({member // local_world_size for member in self.ep_group_of(rank)})
            for rank in range(0, self.world_size, self.ep)
        )

    def describe(self) -> str:
        axes = f"dp_replicate {self.dp_replicate} x efsdp {self.efsdp} x ep {self.ep} = {self.world_size} ranks"
        return axes if self.cp == 1 else f"{axes}, a sequence over cp {self.cp} of them"


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def plan_mesh(
    world_size: int, ep_degree: int, *, dp_replicate: int = 1, dp_shard: int | None = None, cp: int = 1
) -> MeshPlan:
    """Cut `world_size` ranks into (dp_replicate, efsdp, ep).

    Args:
        dp_shard: accelerate's `parallelism_config_dp_shard_size`. None if accelerate built no mesh: FSDP then shards
            over every rank (`world_size / dp_replicate`).
        cp: accelerate's `parallelism_config_cp_size`.

    Raises:
        ValueError: the degrees do not multiply up to the world, or ep does not divide the ranks that FSDP shards over.
    """
    factors = {"dp_replicate_size": dp_replicate, "dp_shard_size": dp_shard, "cp_size": cp}
    if dp_shard is None:
        fsdp_ranks, source = world_size // dp_replicate, "the number of ranks that FSDP shards over"
        factors["dp_shard_size"] = fsdp_ranks // cp
    else:
        fsdp_ranks, source = dp_shard * cp, "dp_shard_size" if cp == 1 else f"dp_shard_size={dp_shard} x cp_size={cp}"
    product = math.prod(size for size in factors.values() if size is not None)
    if product != world_size:
        named = " x ".join(f"{name}={size}" for name, size in factors.items() if name != "cp_size" or cp > 1)
        raise ValueError(
            f"{named} is {product}, but the job has {world_size} ranks. Make the product equal to num_processes in the "
            "accelerate config."
        )
    if fsdp_ranks % ep_degree:
        raise ValueError(
            f"moe_ep_degree={ep_degree} does not divide {source}={fsdp_ranks} ({world_size} ranks). "
            f"Use one of {', '.join(map(str, divisors(fsdp_ranks)))}, or change the number of processes."
        )
    return MeshPlan(dp_replicate=dp_replicate, efsdp=fsdp_ranks // ep_degree, ep=ep_degree, cp=cp)


def build_mesh(plan: MeshPlan, device_type: str) -> DeviceMesh:
    """The (dp_replicate, efsdp, ep) DeviceMesh. A collective: every rank of the world calls it.

    All three axes exist even at size 1, so later code need not ask. A second model of the same plan gets the same mesh:
    process groups, and the memory of NCCL's communicators, are not made twice.
    """
    import torch.distributed as dist

    key = plan, device_type, default_timeout()
    if (found := _meshes.get(key)) is not None and found[0]() is dist.group.WORLD:
        return found[1]
    mesh = _new_mesh(plan, device_type)
    _meshes[key] = weakref.ref(dist.group.WORLD), mesh
    return mesh


_meshes: dict[tuple[MeshPlan, str, datetime.timedelta | None], tuple[weakref.ref, DeviceMesh]] = {}
"""By plan, device type and timeout, with the job's process group at that time, because a new one may replace it."""


def _new_mesh(plan: MeshPlan, device_type: str) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    timeout = default_timeout()  # read before the groups are made: a group split off the job's may share its options
    override = {"ep": options} if plan.ep > 1 and (options := _of_its_own(device_type)) is not None else None
    shape = plan.dp_replicate, plan.efsdp, plan.ep
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=MESH_DIM_NAMES, backend_override=override)
    if timeout is not None:
        for group in mesh.get_all_groups():  # torch made them with its default: half an hour on gloo
            set_timeout(timeout, group)
    return mesh


def set_timeout(timeout: datetime.timedelta, group: ProcessGroup) -> None:
    """Set a group's timeout by torch's own function: public from 2.14 on, private and now deprecated before."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    of_torch = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    of_torch(timeout, group)


def _of_its_own(device_type: str):
    """Options for a communicator of the ep groups' own, on a high-priority stream; None without NCCL.

    A communicator runs one collective at a time. A dimension that spans the world would get the job's communicator, and
    each exchange would wait for FSDP's prefetches and reductions. The priority lets an exchange's few blocks run beside
    a kernel that fills the GPU, such as the weight casts.
    """
    import torch.distributed as dist

    if device_type != "cuda" or not dist.is_nccl_available():
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if (timeout := default_timeout()) is not None:
        options._timeout = timeout
    return options


def default_timeout() -> datetime.timedelta | None:
    """The timeout of the job's process group; None if the backend does not tell it.

    Our groups use it, too: a lost rank then ends an exchange, or a save, as soon as it would end a step.
    """
    import torch.distributed as dist

    try:
        default = dist.group.WORLD
        return default._get_backend(default._device_types[0]).options._timeout  # type: ignore[union-attr]
    except (AttributeError, IndexError, RuntimeError):
        return None


def host_timeout() -> datetime.timedelta:
    """How long hosts wait for each other: the same, or half an hour where the backend does not tell it."""
    return default_timeout() or datetime.timedelta(minutes=30)
