"""What the Trainer checkpoint tests run on ranks: train, stop, resume, and tell what is on the disk."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from tests.distributed.checkpoint_runs import Snapshot, WithOptions, clean, install, snapshot, whole
from tests.distributed.parity import Case, build
from tests.distributed.trainer_parity import InOrder, trainer_arguments


def trainer_of(case: Case, folder: str, options: dict, **arguments):
    from transformers import Trainer

    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = build(case)
    accel_moe.prepare(model, moe_ep_degree=case.ep)
    install()
    if options:
        model._accel_moe = WithOptions(model._accel_moe, options)
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", **arguments}
    return Trainer(
        model=model,
        args=trainer_arguments(case, folder, model, **settings),
        train_dataset=InOrder(),
        eval_dataset=InOrder(),
    )


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(case: Case, folder: str, options: dict, resume=None, **arguments) -> tuple[Snapshot, list[str]]:
    """Trains (from `resume`), and gives the end state and the checkpoint folders' names."""
    trainer = trainer_of(case, folder, options, **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=resume)
    taken = snapshot(trainer.model, trainer.optimizer)
    taken.losses = losses_of(trainer)
    taken.told = [str(w.message) for w in caught]
    return taken, sorted(os.listdir(folder))


def save_whole_model(case: Case, folder: str) -> dict[str, torch.Tensor]:
    """trainer.save_model with SHARDED_STATE_DICT; returns the trained weights."""
    trainer = trainer_of(case, folder, {}, save_strategy="no", max_steps=1)
    trainer.train()
    trainer.save_model(str(Path(folder) / "whole"))
    return {clean(n): whole(p) for n, p in trainer.model.named_parameters()}
