"""SIGTERM in one process: the first is an answer to `stops`, a second one ends the process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from accel_moe import Preemption, PreemptionCallback
from accel_moe.checkpoint import preemption as module


def until_asked(preemption):
    deadline = time.monotonic() + 10
    while not preemption._signal.asked and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_run_stops_after_sigterm_and_prints_how_it_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(module, "launch_command", lambda: ["accelerate", "launch", "my script.py"])
    before = signal.getsignal(signal.SIGTERM)
    preemption = Preemption(resume="--resume")
    assert not preemption.stops()
    for _ in range(2):  # at once: Slurm's and the launcher's are one request
        os.kill(os.getpid(), signal.SIGTERM)
    until_asked(preemption)
    assert preemption.stops()
    preemption.close("runs/checkpoint-7")
    assert signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().out
    assert "runs/checkpoint-7 is saved" in said and said.endswith("\naccelerate launch 'my script.py' --resume\n")


def test_a_run_that_was_not_stopped_says_nothing(capsys):
    preemption = Preemption()
    assert not preemption.stops()
    preemption.close("runs/checkpoint-7")
    assert capsys.readouterr().out == ""


def test_a_forked_child_keeps_its_own_sigterm():
    preemption = Preemption()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    time.sleep(0.2)
    try:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        assert not preemption.stops()
    finally:
        preemption.close()


def test_a_second_sigterm_ends_the_process():
    script = """
import os, signal, time
from accel_moe.checkpoint import preemption
preemption.SAME_REQUEST_S = 0.2
stops = preemption.Preemption()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1)
assert stops.stops()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(30)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
    assert "A second SIGTERM ends the process at once" in done.stderr


def test_a_new_preemption_takes_over_from_one_of_a_loop_that_raised():
    left = Preemption()
    preemption = Preemption()
    os.kill(os.getpid(), signal.SIGTERM)
    until_asked(preemption)
    assert preemption.stops() and not left.stops()
    left.close()
    assert signal.getsignal(signal.SIGTERM) is module._nothing
    preemption.close()
    assert signal.getsignal(signal.SIGTERM) is not module._nothing


def test_transformers_own_checkpoint_on_sigterm_is_refused_beside_the_callback(tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), enable_jit_checkpoint=True, use_cpu=True)
    with pytest.raises(ValueError, match="Remove enable_jit_checkpoint"):
        PreemptionCallback().on_train_begin(args, TrainerState(), TrainerControl())
