"""Started by `accelerate launch` on each of two simulated nodes: trains, saves to this node's folder, or resumes.

python node_script.py FOLDER save|resume
"""

from __future__ import annotations

import json
import os
import sys

import torch

import accel_moe
import accel_moe.cpu
from accel_moe.ranks import gather
from tests.tiny import batches, tiny_model


def main(folder: str, what: str) -> None:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    accel_moe.cpu.enable()
    model = accel_moe.prepare(tiny_model())
    project = ProjectConfiguration(
        project_dir=folder, automatic_checkpoint_naming=True, total_limit=1, save_on_each_node=True
    )
    accelerator = Accelerator(project_config=project)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    losses = []
    if what == "resume":
        accelerator.load_state()
    for step, batch in enumerate(batches(4)[2:] if what == "resume" else batches(4)):
        own = batch.chunk(accelerator.num_processes)[accelerator.process_index]
        loss = model(input_ids=own, labels=own).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach().clone(), "mean").item())
        if what == "save" and step < 2:
            accelerator.save_state()
    everyone = gather(losses)
    assert all(other == losses for other in everyone)
    with open(os.path.join(folder, f"{what}-{accelerator.process_index}.json"), "w") as stream:
        json.dump({"losses": losses, "lr": scheduler.get_last_lr()}, stream)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
