"""What the ranks of test_whereabouts.py do: calls that not every rank makes, or makes late."""

from __future__ import annotations

import logging
import os
import time

import torch
import torch.distributed as dist

from tests.distributed import fault_runs, trainer_checkpoints
from tests.distributed.parity import Case

CASE = Case(2, 2)


class Heard(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("accel_moe").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _quick(look_s: float, warn_s: float) -> None:
    from accel_moe import whereabouts

    whereabouts.LOOK_S, whereabouts._AGAIN_S, whereabouts.WARN_S = look_s, 0.3, warn_s


def save_model_on_the_main_rank(folder: str) -> tuple[str, float]:
    """`if trainer.is_world_process_zero(): trainer.save_model()`: (the error, seconds until it)."""
    trainer = trainer_checkpoints.trainer_of(CASE, folder, {}, save_strategy="no", max_steps=1)
    trainer.train()
    error, start = "", time.monotonic()
    if trainer.is_world_process_zero():
        try:
            trainer.save_model(os.path.join(folder, "final"))
        except RuntimeError as raised:
            error = str(raised)
    took = time.monotonic() - start
    trainer.accelerator.wait_for_everyone()
    return error, took


def calls_of_one_rank(folder: str) -> list[str]:
    """Each call that every rank must make, made by rank 0 alone while rank 1 waits at a barrier: the errors."""
    import accel_moe

    _quick(0.3, 60.0)
    accelerator, model, _ = fault_runs.ready()
    accelerator.save_state(os.path.join(folder, "c"))

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 6, dtype=torch.long, device=accelerator.device))

    calls = (
        lambda: accelerator.save_state(os.path.join(folder, "d")),
        lambda: accelerator.load_state(os.path.join(folder, "c")),
        lambda: accelerator.get_state_dict(model),
        lambda: accelerator.save_model(model, os.path.join(folder, "e")),
        lambda: accel_moe.tokens_per_expert(model),
        forward,
    )
    errors = []
    for call in calls:
        if accelerator.is_main_process:
            try:
                call()
                errors.append("")
            except RuntimeError as error:
                errors.append(str(error))
        accelerator.wait_for_everyone()
    return errors


def a_rank_that_is_slow(late_s: float) -> tuple[list[str], int]:
    """Rank 1 comes late to a save: (what was logged, the requests that 100 more forwards made of the store)."""
    _quick(0.2, 0.6)
    heard = Heard()
    accelerator, model, optimizer = fault_runs.ready()
    import tempfile

    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    if accelerator.process_index == 1:
        time.sleep(late_s)
    accelerator.save_state(os.path.join(shared[0], "c"))
    accelerator.load_state(os.path.join(shared[0], "c"))
    from accel_moe import whereabouts
    from tests.distributed.checkpoint_runs import train

    train(accelerator, model, optimizer, 0, 1)
    asked, original = [], whereabouts._store
    whereabouts._store = lambda: (asked.append(1), original())[1]
    train(accelerator, model, optimizer, 0, 3)
    return heard.lines, len(asked)


def gone_while_others_save(folder: str, timeout_s: float) -> str:
    """Rank 1 does something else until the timeout: what rank 0's save ends with."""
    import datetime

    _quick(0.2, 0.5)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
    accelerator, _, _ = fault_runs.ready()
    if accelerator.process_index == 1:
        time.sleep(timeout_s + 6)
        return ""
    try:
        accelerator.save_state(os.path.join(folder, "c"))
    except Exception as error:
        return str(error)
    return ""
