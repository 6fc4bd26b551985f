"""One family's tiny model on several gloo ranks under FSDP2 and expert parallelism, against one process.

Each rank takes its part of the batch. The loss is linear in the model's output with a fixed random cotangent per
sequence, so that it is defined for every family, with a head or without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tests.families import tiny_families
from tests.families.sweep import compare

SEQUENCES, LENGTH = 4, 6
RELATIVE, ABSOLUTE = 1e-4, 1e-6
"""Of a whole model the experts' sums, taken in another order, pass through what follows: qwen3_5_moe's recurrence makes
2e-5 of the rounding (FSDP2 alone: 4e-6), the others 1e-5 at most. A wrong factor is of order 1. The absolute part is
for gradients that vanish but for rounding (a router whose choice is hashed, a key's bias before a softmax). The loss is
a sum over a sequence's outputs, so that other gradients are of order 0.01 to 10."""


@dataclass(frozen=True)
class Run:
    """What one family's run on ranks gave: each rank's output, and whole gradients by parameter name."""

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    norm: float


def batch() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(2, tiny_families.VOCAB, (SEQUENCES, LENGTH), generator=generator)


def loss_and_output(model: nn.Module, rank: int = 0, world: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over this rank's sequences of <output, cotangent of the sequence>."""
    torch.manual_seed(11)
    out = tiny_families.output_of(model, batch().chunk(world)[rank].to(next(model.parameters()).device))
    cotangent = torch.randn((SEQUENCES, *out.shape[1:]), generator=torch.Generator().manual_seed(5))
    return (out.float() * cotangent.chunk(world)[rank].to(out.device)).sum() / out.shape[0], out.detach().cpu()


def layer_classes(model: nn.Module) -> list[str]:
    """The classes that accelerate shall wrap: the model's own list, as far as this model has them."""
    present = {type(m).__name__ for m in model.modules()}
    return sorted(set(model._no_split_modules or ()) & present)


def accelerator_for(model: nn.Module):
    """An FSDP2 Accelerator that wraps the decoder layers of this model."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layer_classes(model),
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    return Accelerator(fsdp_plugin=plugin)


def on_rank(family: str, kernel: str, ep: int, ours: bool = True) -> Run | None:
    """A forward and backward of `family` on this rank. A Run on rank 0, None elsewhere. A collective."""
    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = tiny_families.tiny(family).build()
    if ours:
        accel_moe.prepare(model, moe_ep_degree=ep, moe_kernel=kernel)
    accelerator = accelerator_for(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    rank, world = accelerator.process_index, accelerator.num_processes
    loss, out = loss_and_output(model, rank, world)
    accelerator.backward(loss)
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    norm = float(whole(accelerator.clip_grad_norm_(model.parameters(), 1e6)))
    optimizer.step()
    outputs: list = [None] * world
    torch.distributed.all_gather_object(outputs, out)
    return Run(outputs, gradients, norm) if rank == 0 else None


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


def on_one_process(family: str, world: int) -> Run:
    """The oracle: the family's own loop, each rank's sequences one after the other, gradients averaged over ranks."""
    model = tiny_families.tiny(family).build()
    tiny_families.use_own_loop(model)
    outputs = []
    for rank in range(world):
        loss, out = loss_and_output(model, rank, world)
        (loss / world).backward()
        outputs.append(out)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Run(outputs, gradients, float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)))


def differences(run: Run, oracle: Run) -> tuple[float, str]:
    """As `sweep.compare`, of the outputs, every gradient and the gradient norm."""

    names = run.gradients.keys() | oracle.gradients.keys()

    def flat(r: Run, other: Run) -> dict[str, torch.Tensor]:
        # FSDP gives a weight that no token reached zeros, where one process leaves None
        gradients = {n: r.gradients[n] if n in r.gradients else 0 * other.gradients[n] for n in sorted(names)}
        return {"output": torch.cat(r.outputs), "norm": torch.tensor([r.norm]), **gradients}

    return compare(flat(run, oracle), flat(oracle, run), ABSOLUTE, RELATIVE)
