"""What the ranks of test_checkpoint_choice.py do: loads that must not happen, and checkpoints of other kinds."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import torch

from accel_moe import ranks
from tests.distributed import fault_runs, trainer_checkpoints
from tests.distributed.checkpoint_runs import clean, set_up, train, whole
from tests.distributed.parity import Case

CASE = Case(2, 2)


def _attempt(act) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def load_one_each(folders: list[str]) -> tuple[str, int]:
    """Each rank is given a folder of its own: (error, the step that its shards hold, -1 for none)."""
    accelerator, model, optimizer = fault_runs.ready()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
    accelerator.register_for_checkpointing(accelerator.prepare(scheduler))
    fault_runs.set_step(model, optimizer, -1)
    error = _attempt(lambda: accelerator.load_state(folders[accelerator.process_index]))
    return error, fault_runs.step_of(model, optimizer)


def resume_from_own_disks(root: str, resumes: list) -> tuple[str, int]:
    """Trainer's resume where each rank has an output folder of its own: (error, the step that was resumed from)."""
    rank = int(os.environ["RANK"])
    trainer = trainer_checkpoints.trainer_of(CASE, os.path.join(root, f"disk{rank}"), {}, max_steps=2)
    trainer.args.save_strategy = "no"
    loaded = []
    original = trainer._load_from_checkpoint
    trainer._load_from_checkpoint = lambda folder, model=None: (loaded.append(folder), original(folder, model))[1]
    error = _attempt(lambda: trainer.train(resume_from_checkpoint=resumes[rank]))
    return error, int(str(loaded[0]).rpartition("-")[2]) if loaded else 0


def other_state_dict_types(folder: str) -> list[str]:
    """Saved with each fsdp_state_dict_type and loaded with the other: what load_state raises."""
    accelerator, model, _ = fault_runs.ready()
    plugin = accelerator.state.fsdp_plugin
    kinds = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")

    def turn(kind: str) -> None:
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type(kind)

    for kind in kinds:
        turn(kind)
        accelerator.save_state(os.path.join(folder, kind))
    errors = []
    for kind, other in (kinds, kinds[::-1]):
        turn(other)
        errors.append(_attempt(lambda kind=kind: accelerator.load_state(os.path.join(folder, kind))))
        errors.append(_attempt(lambda kind=kind: _as_trainer_loads(accelerator, model, os.path.join(folder, kind))))
    return errors


def resume_from_whole_weights(folder: str) -> list[str]:
    """Resumed with FULL_STATE_DICT from a folder that Trainer wrote with save_only_model, and from an empty one."""
    accelerator, model, _ = fault_runs.ready()
    plugin = accelerator.state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    if accelerator.is_main_process:
        os.makedirs(os.path.join(folder, "empty"))
        os.makedirs(os.path.join(folder, "whole"))
        Path(folder, "whole", "model.safetensors").write_bytes(b"")
    accelerator.wait_for_everyone()
    return [
        _attempt(lambda n=n: _as_trainer_loads(accelerator, model, os.path.join(folder, n))) for n in ("whole", "empty")
    ]


def _as_trainer_loads(accelerator, model, folder: str) -> None:
    from transformers import trainer

    trainer.load_fsdp_model(accelerator.state.fsdp_plugin, accelerator, model, folder)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 4
    path.write_bytes(raw)


def resume_what_was_flipped_since(folder: str) -> str:
    """load_best_model_at_end verifies the best checkpoint; then a bit of it flips, and the process resumes from it."""
    trainer = trainer_checkpoints.trainer_of(
        CASE,
        folder,
        {},
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    ranks.barrier()
    if ranks.rank() == 0:
        flip(Path(best) / "pytorch_model_fsdp_0" / "__0_0.distcp")
    ranks.barrier()
    return _attempt(lambda: trainer.train(resume_from_checkpoint=best))


def train_with_best(folder: str, steps: int, resume: str | None) -> tuple[str, dict[str, torch.Tensor]]:
    """(the best checkpoint at the end, the weights then); every evaluation is worse than the first."""
    trainer = trainer_checkpoints.trainer_of(
        CASE,
        folder,
        {},
        max_steps=steps,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train(resume_from_checkpoint=resume)
    return str(trainer.state.best_model_checkpoint), {clean(n): whole(p) for n, p in trainer.model.named_parameters()}


def load_thinned(folder: str, deleted: list[str], level: str) -> tuple[str, list[str], int, bool]:
    """(error, warnings, the step of the weights, whether the optimizer was left alone) of a load of what is left."""
    accelerator, model, optimizer = fault_runs.ready({"moe_verify": level})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
    accelerator.register_for_checkpointing(accelerator.prepare(scheduler))
    fault_runs.set_step(model, optimizer, -1)
    if ranks.rank() == 0:
        for name in deleted:
            path = Path(folder) / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    ranks.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = _attempt(lambda: accelerator.load_state(folder))
    (step,) = {float(v) for p in model.parameters() for v in fault_runs.local(p.detach()).unique()}
    moments = [fault_runs.local(state["exp_avg"]) for state in optimizer.state.values()]
    return error, [str(w.message) for w in caught], int(step), all(bool((m == -1).all()) for m in moments)


def save_stock_step(folder: str, step: int) -> None:
    """A checkpoint of accelerate alone, in a folder of ours."""
    accelerator, model, optimizer = set_up(Case(2, 1, ours=False))
    train(accelerator, model, optimizer, 0, 1)
    fault_runs.set_step(model, optimizer, step)
    project = accelerator.project_configuration
    project.project_dir, project.automatic_checkpoint_naming, project.iteration = folder, True, step
    accelerator.save_state()


def load_newest(folder: str) -> tuple[int, list[str]]:
    accelerator, model, optimizer = fault_runs.ready(None, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerator.load_state()
    return fault_runs.step_of(model, optimizer), [str(w.message) for w in caught]
