"""A plan in words: the table, for a terminal of 100 columns, its notes, and the accelerate config of one mesh."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from accel_moe.planning import memory, meshes
from accel_moe.planning.memory import GIB, Training
from accel_moe.planning.meshes import Plan
from accel_moe.planning.shapes import Shapes
from accel_moe.planning.trace import Traced

WIDTH = 100
WIDTHS = (8, 7, 6, 6, 7, 6, 6, 6, 5, 6, 7, 6, 6, 6, 0)
"""Of each column, the space before it included; the last is as wide as its text."""
GROUPS = " " * 46 + "  --- exchange --   --- peak, GiB ----"
COLUMNS = (
    "mesh",
    "weight",
    "grads",
    "AdamW",
    "activ.",
    "layer",
    "loss",
    *("even", "2x", "worst") * 2,
    "fits",
    " ms/step",
)


def report(
    name: str,
    shapes: Shapes,
    run: Training,
    traced: Traced,
    plans: list[Plan],
    limited: str,
    conditions: Sequence[str] = (),
) -> str:
    """Everything that the command prints but the last line of --write. `conditions` are those of --cp."""
    gpus = plans[0].mesh.world_size
    parts = [
        f"{name} ({shapes.model_type}): {shapes.parameters / 1e9:.2f} B parameters, {shapes.routed / 1e9:.2f} B of "
        f"them in experts; {shapes.layers} layers, {shapes.experts} experts, top {shapes.top_k}.",
        f"{gpus} GPU(s) of {run.memory_bytes / GIB:g} GiB, {min(gpus, run.gpus_per_node)} on a node; "
        f"{_batch(run)} and step; {', '.join(_settings(shapes, run))}.",
    ]
    if limited:
        parts.append(f"Expert parallelism is not possible: {limited}.")
    if conditions:
        parts.append(f"cp {run.cp} needs: {'; '.join(conditions)}.")
    table = ["GiB of one rank; mesh = dp_replicate x efsdp x ep", "", *_table(plans)]
    return "\n".join([*map(_wrapped, parts), "", *table, "", *_advice(shapes, run, plans), "", *_legend(traced)])


def _batch(run: Training) -> str:
    if run.cp == 1:
        return f"{run.sequences} x {run.length} tokens a GPU"
    return f"{run.sequences} x {run.length} tokens over cp {run.cp}, {run.tokens} a GPU"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _settings(shapes: Shapes, run: Training) -> list[str]:
    base = {memory.BF16: "bf16", memory.FP32: "fp32"}[run.base_bytes]
    if run.lora:
        adapters = shapes.adapters(run.lora, run.lora_experts)
        where = "attention and experts" if run.lora_experts else "attention"
        said = [f"LoRA r {run.lora} on {where} ({adapters / 1e6:.1f} M weights) over a frozen base in {base}"]
    else:
        said = ["all weights train", "bf16 weights and moments" if run.bf16_weights else "fp32 master weights"]
    flags = {
        f"experts in {run.quantize}": run.quantize != "none",
        "activation checkpointing": run.checkpointing,
        "up-projection computed again": run.recompute_up,
        "the exchange too runs again": run.checkpointing and not run.keep_exchanged,
        "compiled": run.compiled,
    }
    return said + [words for words, is_on in flags.items() if is_on]


def _table(plans: list[Plan]) -> list[str]:
    return [GROUPS, *(_line(cells) for cells in (COLUMNS, *map(_cells, plans)))]


def _line(cells: tuple[str, ...]) -> str:
    first, *rest = (
        cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, WIDTHS))
    )
    return "".join([first, *rest]).rstrip()


def _cells(plan: Plan) -> tuple[str, ...]:
    use = plan.use
    kinds = use.weights, use.gradients, use.optimizer, use.activations, use.layer, use.loss, *use.exchange, *use.peak
    return (mesh_name(plan), *map(_gib, kinds), plan.verdict, f" {_range(plan.step_ms)}")


def mesh_name(plan: Plan) -> str:
    return f"{plan.mesh.dp_replicate}x{plan.mesh.efsdp}x{plan.mesh.ep}"


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:.1f}" if gib < 999 else f"{gib:.0f}"


def _range(ms: tuple[float, float]) -> str:
    low, high = (f"{value:.0f}" for value in ms)
    return low if low == high else f"{low}-{high}"


def _advice(shapes: Shapes, run: Training, plans: list[Plan]) -> list[str]:
    """The recommended mesh with the reasons, or the changes that would make one fit."""
    best = meshes.recommended(plans)
    if best is None:
        least = min(plans, key=lambda plan: plan.use.peak[0])
        lines = [f"No mesh fits. {mesh_name(least)} needs least: {_gib(least.use.peak[0])} GiB, at {_moment(least)}."]
        found = meshes.remedies(shapes, run, [plan.mesh for plan in plans])
        lines += [
            f"  {flag}: {mesh_name(plan)} fits ({plan.verdict}), {_gib(plan.use.peak[0])} GiB" for flag, plan in found
        ]
        if not found:
            lines.append("  No single flag changes that. Use more GPUs, or --lora 16 with --quantize nf4.")
        return lines
    lines = [f"Recommended: {mesh_name(best)}, the quickest mesh that {_fit_words(best)}."]
    lines += [f"  {line}" for line in _reasons(run, best)]
    against: dict[str, list[str]] = {}
    for plan in plans:
        if plan is not best:
            against.setdefault(_against(plan, best), []).append(mesh_name(plan))
    lines += [f"  {', '.join(names)}: {why}" for why, names in against.items()]
    return [lines[0], *(_wrapped(line, "    ") for line in lines[1:])]


def _fit_words(plan: Plan) -> str:
    return "fits" if plan.verdict == "yes" else "fits; it has no margin"


def _moment(plan: Plan) -> str:
    return {
        "loss": "the loss",
        "embedding": "the end of backward (the embedding's gradient)",
        "layer, forward": "a layer's forward",
        "layer, backward": "the first layer's backward",
        "last layer, backward": "the last layer's backward",
    }[plan.use.at]


def _reasons(run: Training, plan: Plan) -> list[str]:
    total, terms = sum(plan.terms_ms.values()), plan.terms_ms
    longest = sorted(terms, key=lambda name: -terms[name])[:3]
    shares = ", ".join(f"{name} {terms[name] / total:.0%}" for name in longest)
    limit = "the host, which launches kernels, " if plan.host_ms > plan.gpu_ms[1] else "the GPU "
    exchange = {None: "no exchange", True: "tokens travel by all_gather", False: "tokens travel by all_to_all"}
    return [
        f"memory: the peak is at {_moment(plan)}; {exchange[plan.use.all_gather]}.",
        f"step: {limit}sets it (GPU {_range(plan.gpu_ms)} ms, host {plan.host_ms:.0f} ms); of the GPU's: {shares}; "
        f"{_range((run.tokens / plan.step_ms[1] * 1e3, run.tokens / plan.step_ms[0] * 1e3))} tokens/s a GPU.",
    ]


def _against(plan: Plan, best: Plan) -> str:
    """What speaks against a mesh, beside the recommended one."""
    if plan.verdict == "no":
        use = plan.use
        kinds = {
            "weights, gradients and moments": use.weights + use.gradients + use.optimizer,
            "activations": use.activations,
            "the loss": use.loss,
        }
        return f"too large, most of it for {max(kinds, key=lambda kind: kinds[kind])}"
    if plan.verdict == "tight" and best.verdict == "yes":
        return f"fits without a margin: {_gib(plan.use.peak[0])} GiB, {_gib(plan.use.peak[1])} at twice an even routing"
    more = {name: plan.terms_ms[name] - best.terms_ms[name] for name in plan.terms_ms}
    worst = max(more, key=lambda name: more[name])
    if more[worst] < 1:
        return "the same within a millisecond"
    hidden = ", which the host's time hides" if plan.gpu_ms[1] <= plan.host_ms else ""
    return f"{worst} takes {plan.terms_ms[worst]:.0f} ms of the GPU, {best.terms_ms[worst]:.0f} there{hidden}"


def _legend(traced: Traced) -> list[str]:
    how = f"counted: a forward of {traced.tokens} tokens, traced without memory"
    if not traced.tokens:
        how = f"guessed by rule, for the model does not run without memory ({traced.why})"
    lines = [
        "exact     weight, grads, AdamW: the model's parameters, over the ranks.",
        f"activ.    kept for backward, even routing. Outside the experts {how}.",
        "estimated layer (gathered and cast weights, unreduced gradients, what checkpointing makes again), exchange "
        "(rows and pairs of one layer), loss, peak. Kinds do not add up to the peak: not all are there at one time. "
        "It was made to fit the measured runs (Qwen3-MoE, Mixtral, 1 to 4 GPUs, ep = GPUs), and is within 10% there.",
        "2x, worst this rank gets twice an even share in every layer; every token of its ep group.",
        f"fits      {meshes.SET_ASIDE_BYTES / GIB:g} GiB are set aside for CUDA and NCCL. yes: a tenth of the rest is "
        "free. tight: less, or not at 2x.",
        "ms/step   an estimate by the rates of H100s (H200s above 100 GiB) with Qwen3-30B-A3B, NVLink and 400 Gb/s "
        "InfiniBand, even routing. "
        "Other GPUs and other models are not known. Unpacking quantised weights is not counted.",
        "not known fragmentation; outputs that a script keeps; optimizers other than fused AdamW; gradient "
        "accumulation, which keeps gradients during the loss; losses other than transformers' own; fused kernels of "
        "linear attention, counted as transformers' own code in torch; the time that the ring of --cp takes to "
        "pass keys and values on.",
    ]
    return [_wrapped(line, " " * 10) for line in lines]


def accelerate_yaml(shapes: Shapes, run: Training, plan: Plan, command: str) -> str:
    """The accelerate config of one mesh, as accelerate_configs/ has them."""
    mesh, gpus = plan.mesh, plan.mesh.world_size
    dtype = "float32" if run.lora and run.base_bytes == memory.FP32 else "bfloat16"
    machines = math.ceil(gpus / run.gpus_per_node)
    lines = [
        f"# {command}",
        f"# {mesh.describe()}. {shapes.experts} experts: {shapes.experts // mesh.ep} on each rank of ep.",
        f"# Expected: {_gib(plan.use.peak[0])} of {run.memory_bytes / GIB:g} GiB at the peak, with {_batch(run)}.",
        *([f"# Load the model with dtype=torch.{dtype}."] if run.bf16_weights or run.lora else []),
        *(["# Load the model with attn_implementation='sdpa'."] if mesh.cp > 1 else []),
        "distributed_type: FSDP",
        f"num_machines: {machines}",
        f"num_processes: {gpus}",
        *(["main_process_port: 0 # any that is free"] if machines == 1 else []),
        'mixed_precision: "no"' if run.bf16_weights else "mixed_precision: bf16",
        *_compile_lines(run),
        "fsdp_config:",
        "  fsdp_version: 2",
        "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
        "  fsdp_reshard_after_forward: true",
        *(["  fsdp_activation_checkpointing: true"] if run.checkpointing else []),
        "  fsdp_cpu_ram_efficient_loading: true",
        "  fsdp_state_dict_type: SHARDED_STATE_DICT",
        "parallelism_config:",
        *([f"  parallelism_config_dp_replicate_size: {mesh.dp_replicate}"] if mesh.dp_replicate > 1 else []),
        f"  parallelism_config_dp_shard_size: {mesh.dp_shard}",
        *([f"  parallelism_config_cp_size: {mesh.cp}"] if mesh.cp > 1 else []),
        f"  moe_ep_degree: {mesh.ep}",
        *(["  moe_keep_exchanged: false"] if run.checkpointing and not run.keep_exchanged else []),
        *(["  moe_recompute_up_projection: true"] if run.recompute_up else []),
        *([f"  moe_quantize_experts: {run.quantize}"] if run.quantize != "none" else []),
    ]
    return "\n".join(lines) + "\n"


def _compile_lines(run: Training) -> list[str]:
    if not run.compiled:
        return []
    return ["dynamo_config:", "  dynamo_backend: INDUCTOR", "  dynamo_use_regional_compilation: true"]
