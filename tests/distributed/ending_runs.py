"""What the ranks of test_checkpoint_endings.py do: saves in the background, and ends of a script."""

from __future__ import annotations

import atexit
import os
import threading
import time
from pathlib import Path

from torch.distributed import destroy_process_group  # by name, before the package patches anything

from accel_moe import ranks
from accel_moe.checkpoint import background, saving
from tests.distributed import trainer_checkpoints
from tests.distributed.fault_runs import ready, set_step
from tests.distributed.parity import Case

CASE = Case(2, 2)


def slow_to_commit(seconds: float = 0.5, mark: Path | None = None) -> None:
    """From now on the manifest is written this much later; `mark` says that a save is about to write it."""
    write = saving.write_manifest

    def later(folder, manifest):
        if mark is not None:
            mark.touch()
        time.sleep(seconds)
        return write(folder, manifest)

    saving.write_manifest = later


def save_and_end(folder: str, how: str) -> str:
    """Saves in the background, twice, and ends as a script would; "" or what the end raised."""
    accelerator, model, optimizer = ready({"moe_async_save": True})
    slow_to_commit()
    for step in (1, 2):
        set_step(model, optimizer, step)
        accelerator.save_state(os.path.join(folder, f"checkpoint-{step}"))
    try:
        if how == "destroys the process group":
            destroy_process_group()
        else:  # what the interpreter does first when a script returns, raises, or calls sys.exit
            threading._shutdown()
            atexit._run_exitfuncs()
    except BaseException as error:
        return repr(error)
    return ""


def save_as_a_script(folder: str, how: str) -> None:
    """The body of a real script."""
    save = ready({"moe_async_save": True})[0].save_state
    slow_to_commit()
    save(os.path.join(folder, "checkpoint-1"))
    if how == "raises":
        raise ValueError("the script raises")
    if how == "exits":
        raise SystemExit(3)
    if how == "destroys":
        destroy_process_group()


def save_until_a_signal(folder: str, options: dict, seconds: float) -> None:
    """Saves step 1, then step 2 slowly; the mark of step 2 says that it is under way."""
    accelerator, model, optimizer = ready(options)
    set_step(model, optimizer, 1)
    accelerator.save_state(os.path.join(folder, "c"))
    background.wait_for_background()
    ranks.barrier()
    slow_to_commit(seconds, Path(folder) / f"under-way-{accelerator.process_index}")
    set_step(model, optimizer, 2)
    accelerator.save_state(os.path.join(folder, "c"))
    while True:  # trains on, say
        time.sleep(0.05)


def save_with_a_callback(folder: str, options: dict) -> list[tuple[list[str], bool]]:
    """Trainer with a callback that reads and writes in on_save: (what it saw, whether its file is there at the end)."""
    from transformers import TrainerCallback

    slow_to_commit(0.2)
    seen = []

    class Uses(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero:
                seen.append((checkpoint, sorted(os.listdir(checkpoint)) if checkpoint.is_dir() else []))
                checkpoint.mkdir(exist_ok=True)
                (checkpoint / "mine.txt").write_text("mine")

    trainer = trainer_checkpoints.trainer_of(CASE, folder, options, max_steps=2)
    trainer.add_callback(Uses())
    trainer.train()
    return [(names, (checkpoint / "mine.txt").is_file()) for checkpoint, names in seen]


def best_at_the_end(folder: str, options: dict) -> list[str]:
    """save_strategy="best" whose last step is the best: train() lists and deletes folders when it ends."""
    trainer = trainer_checkpoints.trainer_of(
        CASE,
        folder,
        options,
        save_strategy="best",
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=1,
        metric_for_best_model="eval_loss",
    )
    slow_to_commit()
    trainer.train()
    ranks.barrier()
    return sorted(os.listdir(folder))
