"""What the fault tests run on ranks: saves whose every number is the step, so that a mixture would show."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from accel_moe import ranks
from accel_moe.checkpoint import background
from tests.distributed.checkpoint_runs import set_up, train
from tests.distributed.parity import Case

CASE = Case(2, 2)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def numbers_of(model, optimizer) -> list[torch.Tensor]:
    """This rank's shards of the weights and of both Adam moments."""
    found = [local(p.detach()) for p in model.parameters()]
    for state in optimizer.state.values():
        found += [local(state["exp_avg"]), local(state["exp_avg_sq"])]
    return found


@torch.no_grad()
def set_step(model, optimizer, step: int) -> None:
    for tensor in numbers_of(model, optimizer):
        tensor.fill_(float(step))


def step_of(model, optimizer) -> int:
    """The one number that all shards consist of. Raises when there are several."""
    values = {float(v) for tensor in numbers_of(model, optimizer) for v in tensor.unique()}
    assert len(values) == 1, f"a mixture of steps {sorted(values)[:5]}"
    return int(values.pop())


def ready(options: dict | None = None, folder: str | None = None, keep: int = 2):
    """(accelerator, model, optimizer) with Adam state; with `folder` accelerate numbers the checkpoints in it."""
    accelerator, model, optimizer = set_up(CASE, **(options or {}))
    train(accelerator, model, optimizer, 0, 1)
    if folder is not None:
        project = accelerator.project_configuration
        project.project_dir, project.automatic_checkpoint_naming, project.total_limit = folder, True, keep
    return accelerator, model, optimizer


def newest_number(folder: str) -> int:
    parent = Path(folder) / "checkpoints"
    return max([int(p.name[11:]) for p in parent.glob("checkpoint_*")], default=0) if parent.is_dir() else 0


def keep_saving(folder: str, options: dict, one_name: bool) -> None:
    """Resumes from what is there, and saves step after step until it is killed."""
    accelerator, model, optimizer = ready(options, None if one_name else folder)
    target = os.path.join(folder, "c") if one_name else None
    marks = Path(folder) / "marks"
    promised = int((marks / "promised").read_text()) if (marks / "promised").exists() else 0
    step = 0
    if promised or (one_name and os.path.exists(target)) or newest_number(folder):
        accelerator.load_state(target)
        step = step_of(model, optimizer)
    assert step >= promised, f"step {promised} was saved, and {step} was loaded"
    background = bool(options.get("moe_async_save"))
    (marks / f"ready-{accelerator.process_index}").touch()
    while True:
        step += 1
        set_step(model, optimizer, step)
        if not one_name:
            accelerator.project_configuration.iteration = step
        accelerator.save_state(target)
        done = step - 1 if background else step  # a save in the background has ended when the next one begins
        if accelerator.process_index == 0 and done:
            (marks / "new").write_text(str(done))
            (marks / "new").rename(marks / "promised")


def load_one(folder: str, one_name: bool) -> int:
    accelerator, model, optimizer = ready(None, None if one_name else folder)
    accelerator.load_state(os.path.join(folder, "c") if one_name else None)
    return step_of(model, optimizer)


def save_steps(folder: str, steps: list[int], keep: int = 100) -> None:
    """Steps saved as checkpoint_<step>, with a registered object and a scheduler: a file of every role."""
    accelerator, model, optimizer = ready(None, folder, keep)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
    accelerator.register_for_checkpointing(accelerator.prepare(scheduler))
    for step in steps:
        set_step(model, optimizer, step)
        accelerator.project_configuration.iteration = step
        accelerator.save_state()


def load_each(folders: list[str]) -> list[tuple[str, str, bool]]:
    """(error type, text, whether the model was left alone) of loading each folder, in one process group."""
    accelerator, model, optimizer = ready()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
    accelerator.register_for_checkpointing(accelerator.prepare(scheduler))
    results = []
    for folder in folders:
        set_step(model, optimizer, -1)
        try:
            accelerator.load_state(folder)
            results.append(("", f"loaded step {step_of(model, optimizer)}", False))
        except Exception as error:
            results.append((type(error).__name__, str(error), step_of(model, optimizer) == -1))
    return results


def fail_to_save(folder: str, fault: str, options: dict) -> tuple[str, str, int]:
    """Saves step 1, then step 2 with a fault on rank 1 (or on all). (error type, text, step that loads afterwards)."""
    accelerator, model, optimizer = ready(options)
    target = os.path.join(folder, "c")
    set_step(model, optimizer, 1)
    accelerator.save_state(target)
    background.wait_for_background()
    set_step(model, optimizer, 2)
    first = accelerator.process_index == 1
    error: Exception | None = None
    try:
        if fault == "file size limit on one rank" and first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        elif fault == "small files fail on one rank" and first:
            save = torch.save

            def failing(obj, f, *args, **kwargs):
                if "random_states" in str(f):
                    raise OSError(28, "No space left on device", str(f))
                return save(obj, f, *args, **kwargs)

            torch.save = failing
        elif fault == "full disk":
            with open(os.path.join(folder, "filler"), "wb") as stream:
                try:
                    while stream.write(b"x" * 65536):
                        stream.flush()
                except OSError:
                    pass
        accelerator.save_state(target)
        for _ in range(200):  # a failure in the background is heard by a later forward
            train(accelerator, model, optimizer, 0, 1)
            time.sleep(0.01)
    except Exception as raised:
        error = raised
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ranks.barrier()
    if fault == "full disk" and accelerator.process_index == 0:
        os.unlink(os.path.join(folder, "filler"))
    ranks.barrier()
    accelerator.load_state(target)
    return type(error).__name__, str(error), step_of(model, optimizer)


def save_once(folder: str, step: int, times: int) -> None:
    accelerator, model, optimizer = ready()
    for _ in range(times):
        set_step(model, optimizer, step)
        accelerator.save_state(os.path.join(folder, "c"))


def save_into(target: str) -> tuple[str, str]:
    accelerator, _, _ = ready()
    try:
        accelerator.save_state(target)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""
