"""Every legal mesh of a number of GPUs, each with its memory, its step and a verdict; and the one to take."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from accel_moe.experts import recognise
from accel_moe.experts.view import as_interface
from accel_moe.mesh import MeshPlan, divisors, plan_mesh
from accel_moe.planning import memory, step
from accel_moe.planning.memory import GIB, Training, Use
from accel_moe.planning.shapes import Shapes

SET_ASIDE_BYTES = 2 * GIB
"""Of each GPU: the CUDA context and NCCL's buffers, which torch's allocator does not count. A guess."""
MARGIN = 0.9
"""The share of the rest that a peak may take to be called a fit: the model's own error is up to a tenth."""


@dataclass(frozen=True)
class Plan:
    """One mesh.

    Attributes:
        verdict: "yes"; "tight" if the margin is missing, or if twice an even routing does not fit; "no".
        terms_ms: of the GPU, by kind, without overlap.
        gpu_ms: with FSDP's collectives hidden behind compute, and without.
        host_ms: that the host needs to launch the step.
    """

    mesh: MeshPlan
    use: Use
    verdict: str
    terms_ms: dict[str, float]
    gpu_ms: tuple[float, float]
    host_ms: float

    @property
    def step_ms(self) -> tuple[float, float]:
        return max(self.gpu_ms[0], self.host_ms), max(self.gpu_ms[1], self.host_ms)


def legal_meshes(model: nn.Module, gpus: int, cp: int = 1) -> tuple[list[MeshPlan], str]:
    """The meshes that `prepare()` accepts, and why no degree above 1 is among them ("" if one is).

    Args:
        cp: GPUs that share each sequence; divides `gpus`.

    Raises:
        ValueError: the experts cannot be run at any degree, or gpus > 1 and no degree above 1 divides both the GPUs and
            the experts, although the family has no other limit.
    """
    found = recognise.find_experts(model)
    degrees, reasons = [], {}
    for ep in divisors(gpus):
        asked = (recognise.refusal(module, kernel="auto", ep_degree=ep) for module in found.values())
        if why := next(filter(None, asked), None):
            reasons[ep] = why
        else:
            degrees.append(ep)
    if not degrees:
        raise ValueError(f"{type(model).__name__} cannot be run: {reasons[1]}.")
    limited = next(filter(None, (recognise.limits(module) for module in found.values())), "")
    if degrees == [1] and gpus > 1 and not limited:
        experts = min(as_interface(module).num_experts for module in found.values())
        raise ValueError(
            f"No moe_ep_degree above 1 divides both --gpus {gpus} and the {experts} experts of {type(model).__name__}. "
            f"Use a number of GPUs that has one of the factors {', '.join(map(str, divisors(experts)[1:]))}."
        )
    meshes = [
        plan_mesh(gpus, ep, dp_replicate=replicas, cp=cp)
        for replicas in divisors(gpus)
        for ep in reversed(degrees)
        if (gpus // replicas) % math.lcm(ep, cp) == 0
        and (
            gpus == 1 or replicas == 1 or gpus // replicas > cp
        )  # dp_shard 1: a copy a rank is DDP, not with cp either
    ]
    return meshes, limited


def plans_of(shapes: Shapes, run: Training, meshes: Iterable[MeshPlan]) -> list[Plan]:
    return [_plan(shapes, run, mesh) for mesh in meshes]


def _plan(shapes: Shapes, run: Training, mesh: MeshPlan) -> Plan:
    use = memory.use_of(shapes, run, mesh)
    job = job_of(shapes, run, mesh)
    terms = step.terms_ms(job)
    slow, fast = step.step_ms(terms)
    return Plan(mesh, use, _verdict(use, run.memory_bytes), terms, (fast, slow), step.host_ms(job))


def _verdict(use: Use, memory_bytes: float) -> str:
    usable = memory_bytes - SET_ASIDE_BYTES
    even, twice, _ = use.peak
    if even > usable:
        return "no"
    return "yes" if even <= MARGIN * usable and twice <= usable else "tight"


def job_of(shapes: Shapes, run: Training, mesh: MeshPlan) -> step.Job:
    """The same job for the model of a step's time."""
    model = step.Model(
        layers=shapes.layers,
        moe_layers=shapes.moe_layers,
        hidden=shapes.hidden,
        vocabulary=shapes.vocabulary,
        attention=shapes.attention,
        experts=shapes.experts,
        top_k=shapes.top_k,
        dense=shapes.dense,
        routed=shapes.routed,
        embeddings=shapes.embedding + shapes.head,
        trained=shapes.adapters(run.lora, run.lora_experts) if run.lora else None,
    )
    return step.Job(
        model,
        ep=mesh.ep,
        efsdp=mesh.efsdp,
        replicas=mesh.dp_replicate,
        per_node=run.gpus_per_node,
        tokens=run.tokens,
        length=run.length,
        checkpointing=run.checkpointing,
        bf16_weights=run.bf16_weights or (run.lora > 0 and run.base_bytes == memory.BF16),
        compiled=run.compiled,
        exchange_again=run.checkpointing and not run.keep_exchanged,
        expert_bytes=shapes.packed_bytes(run.quantize) / shapes.routed if run.quantize != "none" else 2,
        rates=step.rates_of(run.memory_bytes),
    )


def recommended(plans: list[Plan]) -> Plan | None:
    """The quickest mesh that fits; if none does with a margin, the quickest that is tight. None if none fits."""
    for verdict in ("yes", "tight"):
        if fits := [plan for plan in plans if plan.verdict == verdict]:
            return min(fits, key=lambda plan: (round(sum(plan.step_ms)), sum(plan.gpu_ms), plan.use.peak[0]))
    return None


def remedies(shapes: Shapes, run: Training, meshes: list[MeshPlan]) -> list[tuple[str, Plan]]:
    """Changes of the run, each by itself, under which a mesh fits: the flag, and the best plan then."""
    half = max(1, run.sequences // 2)
    changes = {
        "--recompute-up": {"recompute_up": True},
        "--activation-checkpointing": {"checkpointing": True},
        f"--sequences {half}": {"sequences": half, "saved_bytes": run.saved_bytes * half // run.sequences},
        "--bf16-weights": {"bf16_weights": not run.lora},
        "--exchange-again": {"keep_exchanged": not run.checkpointing},
        "--activation-checkpointing --exchange-again": {"checkpointing": True, "keep_exchanged": False},
    }
    tried: dict[Training, str] = {run: ""}
    for flags, change in changes.items():
        tried.setdefault(replace(run, **change), flags)
    found = ((flags, recommended(plans_of(shapes, other, meshes))) for other, flags in tried.items() if flags)
    return [(flags, plan) for flags, plan in found if plan is not None]
