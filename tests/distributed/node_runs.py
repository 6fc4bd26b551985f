"""Runs on simulated nodes: each rank's paths lie in its node's folder, as with disks of their own."""

from __future__ import annotations

import os

from tests.distributed.checkpoint_runs import Snapshot, set_up, snapshot, train
from tests.distributed.parity import Case


def disk_of(root: str, rank: int, per_node: int, swapped: bool = False) -> str:
    node = rank // per_node
    return os.path.join(root, f"node{1 - node if swapped else node}")


def save(case: Case, root: str, per_node: int, options: dict) -> Snapshot:
    import torch
    from accelerate import PartialState

    accelerator, model, optimizer = set_up(case, **options)
    accelerator.project_configuration.save_on_each_node = True
    os.environ["LOCAL_RANK"] = str(accelerator.process_index % per_node)
    PartialState._shared_state["local_process_index"] = accelerator.process_index % per_node
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0))
    train(accelerator, model, optimizer, 0, 1)
    for _ in range(2):  # the second time onto folders that are there
        accelerator.save_state(os.path.join(disk_of(root, accelerator.process_index, per_node), "c"))
    taken = snapshot(model, optimizer)
    accelerator.end_training()
    del scheduler
    return taken


def load(case: Case, root: str, per_node: int, swapped: bool) -> tuple[str, Snapshot | None]:
    import torch

    accelerator, model, optimizer = set_up(case)
    accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0))
    try:
        accelerator.load_state(os.path.join(disk_of(root, accelerator.process_index, per_node, swapped), "c"))
    except Exception as error:
        return f"{type(error).__name__}: {error}", None
    return "", snapshot(model, optimizer)
