"""SIGTERM (Slurm, spot instances) as a question that every rank answers alike after each step: does the run stop here?

    preemption = accel_moe.Preemption(resume="--resume")      after Accelerator(); a collective
    after each optimizer step:
        if preemption.stops():                                the same answer on every rank, at the same step
            accelerator.save_state(folder)
            break
    preemption.close(folder)                                  prints the command that resumes, if the run was stopped

`PreemptionCallback` does this for Trainer and TRL. Nothing here waits for a GPU:

    ranks of one node      exchange their answers in host memory; the run stops after the step in which SIGTERM came
    ranks of several       an all-reduce over gloo, which travels during the next step: the run stops one step later

A rank that waits inside a collective is deaf for Python's signal handlers. So the interpreter's C handler writes each
signal into a pipe, and a thread reads it. A second SIGTERM ends the process at once, with exit code 143, in whatever
call the main thread is. Signals within `SAME_REQUEST_S` are one: Slurm signals the launcher and its workers, and the
launcher signals the workers, too.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from accel_moe import ranks
from accel_moe.checkpoint.background import wait_for_background
from accel_moe.dispatch.host_all_gather import new_board
from accel_moe.launcher import launch_command
from accel_moe.mesh import host_timeout

SAME_REQUEST_S = 2.0
KILLED = 128 + signal.SIGTERM


class Preemption:
    """Takes over SIGTERM until `close`. Made, asked and closed by every rank; each of these is a collective.

    Args:
        resume: the words that make the script go on from its newest checkpoint, added to the printed command.

    Raises:
        ValueError: not in the main thread, which alone may handle signals.
    """

    def __init__(self, resume: str = ""):
        self._resume = resume
        self._stopped = False
        self._signal = _Sigterm()
        self._agreement = _agreement() if ranks.distributed() else None

    def stops(self) -> bool:
        """Whether the run stops after this step. Called once after each step, until it is true."""
        asked = self._signal.asked
        self._stopped = asked if self._agreement is None else self._agreement.any(asked)
        return self._stopped

    def close(self, checkpoint: str | Path = "") -> None:
        """Gives SIGTERM back. After a stop, waits until `checkpoint` is committed; the main rank names it, and the
        command that resumes."""
        if self._stopped:
            wait_for_background()
        if self._agreement is not None:
            self._agreement.close()
        self._signal.close()
        if self._stopped and ranks.is_rank0():
            saved = f" {checkpoint} is saved." if checkpoint else ""
            print(f"accel_moe: stopped by SIGTERM.{saved} To go on:\n{self._command()}", flush=True)

    def _command(self) -> str:
        words, more = launch_command(), shlex.split(self._resume)
        return shlex.join(words if more == words[len(words) - len(more) :] else [*words, *more])


class PreemptionCallback(TrainerCallback):
    """For Trainer and TRL: SIGTERM ends `trainer.train()` after the step under way, with a checkpoint.

    Args:
        resume: the words that make the script resume, as for `Preemption`.

    Raises (in `train`):
        ValueError: together with `enable_jit_checkpoint`, whose ranks each stop at a step of their own.
    """

    def __init__(self, resume: str = ""):
        self._resume = resume
        self._preemption: Preemption | None = None
        self.stopped = False
        """Whether the last `train()` was stopped; for the script that goes on after it."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.enable_jit_checkpoint:
            raise ValueError(
                "PreemptionCallback with enable_jit_checkpoint=True: both would handle SIGTERM, and transformers' own "
                "lets each rank stop at another step. Remove enable_jit_checkpoint."
            )
        self._preemption, self.stopped = Preemption(self._resume), False

    def on_step_end(self, args, state, control, **kwargs):
        if not self.stopped and self._preemption is not None and self._preemption.stops():
            self.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the time until SIGKILL is the save's

    def on_train_end(self, args, state, control, **kwargs):
        if self._preemption is not None:
            self._preemption.close(Path(args.output_dir, f"checkpoint-{state.global_step}"))
            self._preemption = None


# --- the signal --------------------------------------------------------------------------------------------------


_active: _Sigterm | None = None


class _Sigterm:
    """`asked` turns true at the first SIGTERM; the second ends the process. One at a time: a new one takes over."""

    def __init__(self):
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("Preemption was made in a thread; only the main thread may handle SIGTERM. Make it there.")
        global _active
        if _active is not None:  # of a loop that raised
            _active.close()
        self.asked = False
        self._asked_at_s = 0.0
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handler_before = signal.signal(signal.SIGTERM, _nothing)
        self._pipe_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="accel_moe-sigterm", daemon=True).start()
        _active = self

    def _listen(self) -> None:
        while numbers := os.read(self._read, 64):
            if self._pipe_before >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._pipe_before, numbers)
            if signal.SIGTERM in numbers:
                self._on_sigterm()
        os.close(self._read)

    def _on_sigterm(self) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._asked_at_s = True, now
            _say("SIGTERM: the run stops after this step and saves. A second SIGTERM ends the process at once.")
        elif now - self._asked_at_s > SAME_REQUEST_S:
            _say("a second SIGTERM: the process ends at once.")
            os._exit(KILLED)

    def close(self) -> None:
        global _active
        if _active is not self:
            return
        _active = None
        signal.set_wakeup_fd(self._pipe_before)
        signal.signal(signal.SIGTERM, self._handler_before)
        os.close(self._write)  # ends the thread


def _in_a_child() -> None:
    """SIGTERM of a forked process (a data loader's worker) is its own again, and no news for the parent."""
    if _active is not None:
        with contextlib.suppress(ValueError):  # forked by another thread than the main one
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_a_child)


def _nothing(signum: int, frame: Any) -> None:
    """A handler in Python, so that the interpreter's own writes to the pipe."""


def _say(text: str) -> None:
    os.write(2, f"accel_moe: {text}\n".encode())


# --- the agreement -----------------------------------------------------------------------------------------------


def _agreement() -> _InHostMemory | _OverGloo:
    timeout = host_timeout()
    group: Any = dist.new_group(backend="gloo", timeout=timeout)  # not the saves' own, which their thread may be using
    board = new_board(group, 1, timeout)
    if board is None:
        return _OverGloo(group)
    dist.destroy_process_group(group)
    return _InHostMemory(board)


class _InHostMemory:
    def __init__(self, board: Any):
        self._board = board

    def any(self, asked: bool) -> bool:
        return any(found for (found,) in self._board.exchange([int(asked)]))

    def close(self) -> None:
        pass


class _OverGloo:
    """Answers with what the ranks knew a step ago: that all-reduce has travelled meanwhile."""

    def __init__(self, group: Any):
        self._group = group
        self._travelling: tuple[Any, torch.Tensor] | None = None

    def any(self, asked: bool) -> bool:
        found = self._arrived()
        flag = torch.tensor([int(asked)], dtype=torch.int32)
        self._travelling = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag
        return found

    def _arrived(self) -> bool:
        if self._travelling is None:
            return False
        work, flag = self._travelling
        work.wait()
        return bool(flag.item())

    def close(self) -> None:
        self._arrived()
        dist.destroy_process_group(self._group)
