"""Hub format -> shards on ranks -> one step -> checkpoint -> Hub format -> transformers, for one family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tests.families import over_ranks, tiny_families


@dataclass(frozen=True)
class Trained:
    """Whole weights by name, as loaded and after one step."""

    loaded: dict[str, torch.Tensor]
    stepped: dict[str, torch.Tensor]


def write_base(family: str, folder: str) -> dict[str, torch.Tensor]:
    """save_pretrained of the family's tiny model; its state dict, as transformers itself reads it back.

    Raises:
        ValueError: transformers' own round trip already loses something.
    """
    tiny = tiny_families.tiny(family)
    model = tiny.build()
    model.save_pretrained(folder, max_shard_size="40KB")
    back = tiny.model_class.from_pretrained(folder, dtype="float32").state_dict()
    for name, tensor in model.state_dict().items():
        if name not in back or not torch.equal(back[name], tensor):
            raise ValueError(f"save_pretrained and from_pretrained of transformers change {name}")
    return back


def train_on_rank(family: str, base: str, checkpoint: str) -> Trained | None:
    """Reads `base` into shards (ep 2), makes one step, saves. Trained on rank 0, None elsewhere. A collective."""
    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    accelerator = over_ranks.accelerator_for(tiny_families.tiny(family).build())
    model = accel_moe.from_pretrained(base, model_class=tiny_families.tiny(family).model_class, dtype="float32")
    model.train()
    accel_moe.prepare(model, moe_ep_degree=2, moe_kernel="grouped_mm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    loaded = weights_of(model)
    rank, world = accelerator.process_index, accelerator.num_processes
    loss, _ = over_ranks.loss_and_output(model, rank, world)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    accelerator.save_state(checkpoint)
    stepped = weights_of(model)
    return Trained(loaded, stepped) if rank == 0 else None


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n.replace("_orig_mod.", ""): over_ranks.whole(t) for n, t in model.state_dict().items()}
