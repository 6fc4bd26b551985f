"""The small model's training: the batch, the loss, one run on ranks, and the same run in one process.

`on_ranks` is the run that is judged: `prepare`, FSDP2, two steps, a save, a resume. `in_one_process` is its meaning:
the model's own loop, each rank's sequences one after the other, gradients averaged. Both are fp32.
Rank 0 writes trained.pt (a Run), resumed.pt (each rank's list of what did not come back) and the folder checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from accel_moe.diagnosis import shrink
from accel_moe.mesh import MeshPlan
from accel_moe.names import plain_name

STEPS, LEARNING_RATE, MAX_NORM = 2, 1e-2, 1.0
SEQUENCES, LENGTH = 12, 8
"""Any number of ranks up to 4 divides the sequences."""

RELATIVE, ABSOLUTE = {"cpu": 1e-4, "cuda": 1e-3}, 1e-6
"""Of a tensor's largest value: sums in another order, through two layers; on a GPU with other tile sizes, too. A wrong
factor is of order 1. The absolute part is for gradients that vanish but for rounding. After a step the loss and the
norm follow AdamW, which makes steps of the learning rate's size of rounding in tiny gradients: `LATER` times as much.
"""
LATER = 100


@dataclass(frozen=True)
class Request:
    """What the ranks are to train.

    Attributes:
        config: of the small model.
        options: every field of MoEConfig.
        checkpointing: accelerate's fsdp_activation_checkpointing.
    """

    config: Any
    plan: MeshPlan
    options: dict[str, Any]
    checkpointing: bool = False


@dataclass
class Run:
    """Whole tensors on the CPU, by parameter name; gradients of the first step.

    Attributes:
        unequal: parameters whose replicas have different bits.
        logits: of the whole batch, after the last step.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    unequal: list[str] = field(default_factory=list)
    logits: torch.Tensor | None = None


def batch(step: int) -> torch.Tensor:
    """Token ids [SEQUENCES, LENGTH]. Tokens 0 and 1 are left out: they may be padding or the end."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(2, shrink.VOCAB - 4, (SEQUENCES, LENGTH), generator=generator)


def logits_of(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """The logits, or of a model without a head its last hidden state."""
    torch.manual_seed(11)  # jitter and dropout draw the same numbers on ranks and in one process
    out = model(input_ids=input_ids.to(next(model.parameters()).device))
    found = getattr(out, "logits", None)
    return found if found is not None else out.last_hidden_state


def loss_of(model: nn.Module, step: int, rank: int, ranks: int) -> torch.Tensor:
    """Cross entropy of the next token, summed over a sequence, the mean over this rank's sequences."""
    ids = batch(step).chunk(ranks)[rank]
    logits = logits_of(model, ids).float()
    wanted = ids[:, 1:].flatten().to(logits.device) % logits.shape[-1]  # a model without a head has fewer columns
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, reduction="sum") / len(ids)


def in_one_process(config: Any, ranks: int, device: str) -> Run:
    """The model's own eager loop on the whole batch."""
    model = shrink.small_model(config).to(device)
    if any(hasattr(module, "is_concatenated") for module in model.modules()):
        model.set_experts_implementation("eager")
    optimizer, run = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), Run()
    for step in range(STEPS):
        losses = []
        for rank in range(ranks):
            loss = loss_of(model, step, rank, ranks)
            (loss / ranks).backward()
            losses.append(loss.item())
        run.gradients = run.gradients or dict(_whole_gradients(model))
        run.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(sum(losses) / ranks)
    return run


def differences(run: Run, oracle: Run, device: str) -> Iterator[tuple[str, str]]:
    """(part, difference in words) of each part of a run that leaves the tolerances: "loss", "gradients", "norm"."""
    allowed = RELATIVE[device]
    for part, found, expected in (("loss", run.losses, oracle.losses), ("norm", run.norms, oracle.norms)):
        for step, (one, other) in enumerate(zip(found, expected, strict=True)):
            if not abs(one - other) <= allowed * (LATER if step else 1) * abs(other) + ABSOLUTE:
                yield part, f"step {step + 1} has {one:.6g}, one process has {other:.6g}"
                break
    wrong: list[tuple[float, str]] = []
    for name in sorted(run.gradients.keys() | oracle.gradients.keys()):
        # FSDP gives a weight that no token reached zeros, where one process leaves None
        some = next(r.gradients[name] for r in (run, oracle) if name in r.gradients)
        found, expected = (r.gradients.get(name, torch.zeros_like(some)) for r in (run, oracle))
        largest, gap = float(expected.abs().max()), float((found - expected).abs().max())
        if not gap <= allowed * largest + ABSOLUTE:
            ratio = float((found * expected).sum() / expected.square().sum().clamp(min=1e-30))
            text = f"{name} is off by {gap:.1e} of {largest:.1e} (about {ratio:.3g} times the right one)"
            wrong.append((gap / max(largest, ABSOLUTE), text))
    if wrong:
        yield "gradients", f"{len(wrong)} of {len(oracle.gradients)} are wrong, most of all {max(wrong)[1]}"


# ---- On ranks


def on_ranks(request: Request, folder: Path) -> None:
    """Trains, saves, resumes. A collective of all ranks."""
    accelerator, model, optimizer = _prepared(request)
    run, logits = Run(), None
    for step in range(STEPS):
        _step(accelerator, model, optimizer, step, run)
    run.unequal = unequal_replicas(model)
    with torch.no_grad():
        ranks, rank = accelerator.num_processes, accelerator.process_index
        logits = accelerator.gather(logits_of(model, batch(0).chunk(ranks)[rank]).float()).cpu()
    run.logits = logits
    if accelerator.is_main_process:
        torch.save(run, folder / "trained.pt")
    accelerator.save_state(str(folder / "checkpoint"))
    before = _local_bits(model, optimizer)
    _step(accelerator, model, optimizer, STEPS, run)
    after = _local_bits(model, optimizer)
    accelerator.load_state(str(folder / "checkpoint"))
    resumed = _unequal(before, _local_bits(model, optimizer))
    _step(accelerator, model, optimizer, STEPS, run)
    continued = _unequal(after, _local_bits(model, optimizer))
    found: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(found, (resumed, continued))
    if accelerator.is_main_process:
        torch.save(found, folder / "resumed.pt")


def _prepared(request: Request) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = shrink.small_model(request.config)
    layers = sorted(set(model._no_split_modules or ()) & {type(module).__name__ for module in model.modules()})
    accel_moe.prepare(model, **request.options)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layers,
        activation_checkpointing=request.checkpointing,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    plan = request.plan
    mesh = ParallelismConfig(dp_replicate_size=plan.dp_replicate, dp_shard_size=plan.dp_shard)
    accelerator = Accelerator(fsdp_plugin=plugin, parallelism_config=mesh if plan.world_size > 1 else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def _step(accelerator: Any, model: nn.Module, optimizer: Any, step: int, run: Run) -> None:
    loss = loss_of(model, step, accelerator.process_index, accelerator.num_processes)
    accelerator.backward(loss)
    run.gradients = run.gradients or dict(_whole_gradients(model))
    run.norms.append(float(_whole(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM))))
    optimizer.step()
    optimizer.zero_grad()
    run.losses.append(float(accelerator.reduce(loss.detach().clone(), "mean")))


def _whole_gradients(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield plain_name(name), _whole(parameter.grad)


def _whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


def unequal_replicas(model: nn.Module) -> list[str]:
    """The parameters whose replicas differ in a bit. A collective; every rank has the same list."""
    mine = {}
    for name, parameter in model.named_parameters():
        place = ()
        if (mesh := getattr(parameter, "device_mesh", None)) is not None:
            coordinates = zip(mesh.mesh_dim_names or (), mesh.get_coordinate(), parameter.placements)
            place = tuple(at for _, at, placement in coordinates if not placement.is_replicate())
        mine[name, place] = _bits(parameter)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    first: dict[tuple[str, tuple[int, ...]], bytes] = {}
    unequal = set()
    for bits in everyone:
        for key, value in bits.items():
            if first.setdefault(key, value) != value:
                unequal.add(key[0])
    return sorted(unequal)


def _local_bits(model: nn.Module, optimizer: Any) -> dict[str, bytes]:
    """This rank's part of each parameter and of the optimizer's state, as bytes."""
    bits = {}
    for name, parameter in model.named_parameters():
        bits[name] = _bits(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            bits[f"{key} of {name}"] = _bits(torch.as_tensor(value))
    return bits


def _unequal(first: dict[str, bytes], second: dict[str, bytes]) -> list[str]:
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def _bits(tensor: Any) -> bytes:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
