"""What the checkpoint tests run on ranks: train a few steps, save, load, and give back everything as whole tensors."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from accel_moe.long_context import context_parallel, cp_size
from tests.distributed import parity
from tests.distributed.parity import Case, clean, prepared, whole
from tests.tiny import batches

TRAINED, CONTINUED = 2, 2  # steps before the save, and after it


@dataclass
class Snapshot:
    """A model's and its optimizer's whole tensors by name, and the losses of the steps that followed."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    losses: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


def install() -> None:
    """The patches that are for checkpoints."""
    from accel_moe import patching
    from accel_moe.checkpoint import background, for_accelerate, for_trainer

    patching.install(patching.patches_of(for_accelerate, background, for_trainer))


def set_up(case: Case, **options):
    """(accelerator, model, optimizer) of a case, with the options that concern checkpoints."""
    install()
    accelerator, model, optimizer = prepared(case)
    if options and case.ours:
        model._accel_moe = WithOptions(model._accel_moe, options)
    return accelerator, model, optimizer


class WithOptions:
    """A PreparedState whose config has other values of the checkpoint options."""

    def __init__(self, state, options: dict):
        self._state = state
        self.config = SimpleNamespace(**{**vars(state.config), **options})

    def __getattr__(self, name: str):
        return getattr(self._state, name)


def train(accelerator, model, optimizer, first: int, steps: int) -> list[float]:
    """The mean loss of each step over the whole batch: the same for any number of ranks, also of those that share a
    sequence."""
    losses, cp = [], cp_size(accelerator)
    for batch in batches(first + steps, sequences=12, length=8)[first:]:
        own = batch.chunk(accelerator.num_processes // cp)[accelerator.process_index // cp].to(accelerator.device)
        whole_or_part = {"input_ids": own, "labels": own}
        with context_parallel(accelerator, whole_or_part) if cp > 1 else nullcontext(whole_or_part) as arguments:
            loss = model(**arguments).loss
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach().clone(), "mean").item())
    return losses


def snapshot(model, optimizer) -> Snapshot:
    """A collective."""
    state = get_optimizer_state_dict(model, optimizer.optimizer)["state"]
    moments = {f"{name}.{key}": whole(value) for name, values in state.items() for key, value in values.items()}
    return Snapshot({clean(n): whole(p) for n, p in model.named_parameters()}, moments)


def save_run(case: Case, folder: str, times: int = 1, **options) -> Snapshot:
    """Trains, saves `times` times onto one folder, trains on: what a resumed run must reproduce."""
    accelerator, model, optimizer = set_up(case, **options)
    train(accelerator, model, optimizer, 0, TRAINED)
    taken = snapshot(model, optimizer)
    for _ in range(times):
        accelerator.save_state(folder)
    taken.losses = train(accelerator, model, optimizer, TRAINED, CONTINUED)
    accelerator.end_training()
    return taken


def load_runs(case: Case, folders: list[str], **options) -> list[Snapshot]:
    """One fresh run that loads one folder after the other, and trains on after each."""
    accelerator, model, optimizer = set_up(case, **options)
    snapshots = []
    for folder in folders:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            accelerator.load_state(folder)
        taken = snapshot(model, optimizer)
        taken.losses = train(accelerator, model, optimizer, TRAINED, CONTINUED)
        taken.told = [str(warning.message) for warning in caught]
        snapshots.append(taken)
    return snapshots


def load_errors(case: Case, folder: str, **options) -> list:
    """(type, text, weights untouched) of what load_state raises on this rank."""
    accelerator, model, _ = set_up(case, **options)
    before = {n: p.detach().to_local().clone() for n, p in model.named_parameters()}
    try:
        accelerator.load_state(folder)
    except Exception as error:
        after = {n: p.detach().to_local() for n, p in model.named_parameters()}
        return [type(error).__name__, str(error), all(torch.equal(before[n], after[n]) for n in before)]
    return ["", "nothing was raised", True]


def schedule_run(case: Case, folder: str, load: bool) -> list[float]:
    """Learning rates, as accelerate steps the schedule: before or after the checkpoint, and after one more step."""
    accelerator, model, optimizer = set_up(case)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda batches_seen: 1 / (1 + batches_seen))
    scheduler = accelerator.prepare(schedule)
    rates = []
    if load:
        accelerator.load_state(folder)
    for step in range(1 if load else 2):
        train(accelerator, model, optimizer, step, 1)
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0] / scheduler.scheduler.base_lrs[0])
    if not load:
        accelerator.save_state(folder)
    return rates


def whole_weights(case: Case, folder: str) -> dict:
    """A whole model by get_state_dict, save_model and save_pretrained, and a round trip with FULL_STATE_DICT."""
    accelerator, model, optimizer = set_up(case)
    train(accelerator, model, optimizer, 0, 1)
    taken = snapshot(model, optimizer)
    root = Path(folder)
    state_dict = accelerator.get_state_dict(model)
    accelerator.save_model(model, root / "save_model")
    accelerator.unwrap_model(model).save_pretrained(
        root / "save_pretrained", is_main_process=accelerator.is_main_process, state_dict=dict(state_dict)
    )
    plugin = accelerator.state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    accelerator.save_state(root / "full")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(root / "full")
    return {"taken": taken, "state_dict": state_dict, "loaded": snapshot(model, optimizer)}


def with_unused_parameter(run, *arguments):
    """`run` with a model that has a parameter which no forward uses: AdamW has no state of it."""
    build = parity.build

    def built(case: Case):
        model = build(case)
        model.model.unused = torch.nn.Parameter(torch.ones(4))
        return model

    with mock.patch.object(parity, "build", built):
        return run(*arguments)


def save_and_load_again(case: Case, folder: str) -> tuple[list[float], list[float]]:
    """The losses after a save, and after the same run has loaded it."""
    accelerator, model, optimizer = set_up(case)
    train(accelerator, model, optimizer, 0, TRAINED)
    accelerator.save_state(folder)
    wanted = train(accelerator, model, optimizer, TRAINED, CONTINUED)
    accelerator.load_state(folder)
    return wanted, train(accelerator, model, optimizer, TRAINED, CONTINUED)


def load_with_more_parameters(case: Case, folder: str) -> str:
    """What load_state says where the optimizer has a parameter that the saved one had not."""
    accelerator, model, optimizer = set_up(case)
    train(accelerator, model, optimizer, 0, 1)
    chosen = next(p for n, p in model.named_parameters() if "norm" in n)
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not chosen]
    optimizer.state.pop(chosen, None)
    accelerator.save_state(folder)
    group["params"].append(chosen)
    try:
        accelerator.load_state(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
