"""SIGTERM to running examples: they save and end well, and the command they print goes on as if nothing had been."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.launch.test_examples import LAUNCH, REPOSITORY, SMALL, environment, python
from tests.launch.test_examples import base as base  # a fixture

pytestmark = pytest.mark.launch

STEPS = 30


class Run:
    """An example that runs on two ranks, its output read up to its third step."""

    def __init__(self, words):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            env=environment(),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,  # also ends a line where a progress bar begins again
        )
        self.output = ""
        while not re.search(rf"\b[3-9]/{STEPS}\b", self.output):
            line = self.process.stdout.readline()
            assert line, self.output
            self.output += line
        workers = psutil.Process(self.process.pid).children()
        self.workers = sorted(workers, key=lambda worker: int(worker.environ()["RANK"]))

    def end(self) -> int:
        """The exit status."""
        self.output += self.process.communicate(timeout=120)[0]
        return self.process.returncode


def words_of(script, base, output, save_every=1000):
    every = ["--log-every", "1", "--eval-every", "1000", "--save-every", save_every, "--steps", STEPS]
    return [*LAUNCH, f"examples/{script}", "--model", base, "--output", output, *SMALL, *every]


def losses_of(script, output):
    if script == "train.py":
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    history = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return {line["step"]: line["loss"] for line in history if "loss" in line}


def stopped(script, base, output):
    """SIGTERM to rank 1 alone; the checkpoint that both ranks saved, and the words of the command that was printed."""
    run = Run(words_of(script, base, output))
    run.workers[1].send_signal(signal.SIGTERM)
    assert run.end() == 0, run.output
    (checkpoint,) = output.glob("checkpoint-*")
    assert f"{checkpoint} is saved" in run.output
    return checkpoint, shlex.split(run.output.split("To go on:\n")[1].splitlines()[0])


def test_sigterm_to_one_rank_ends_all_with_status_0_and_a_committed_checkpoint(base, tmp_path):
    checkpoint, command = stopped("train_trainer.py", base, tmp_path)
    assert 3 <= int(checkpoint.name.removeprefix("checkpoint-")) < STEPS
    python("-m", "accel_moe.consolidate", "--inspect", checkpoint)
    assert command[1:] == [*map(str, words_of("train_trainer.py", base, tmp_path)), "--resume"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_trainer.py", "train.py"])
def test_the_printed_command_goes_on_with_the_losses_of_the_run_that_never_stopped(script, base, tmp_path):
    python(*words_of(script, base, tmp_path / "whole"))
    _, command = stopped(script, base, tmp_path / "halves")
    python(*command[1:])
    found, expected = losses_of(script, tmp_path / "halves"), losses_of(script, tmp_path / "whole")
    # the same sums on the same ranks in the same order, from state restored to the bit
    assert found == pytest.approx(expected, abs=1e-6) and sorted(found) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_sigterm_to_the_launcher_and_to_its_workers_is_one_request(base, tmp_path):
    run = Run(words_of("train_trainer.py", base, tmp_path))
    for process in [*run.workers, psutil.Process(run.process.pid)]:  # as Slurm does; the launcher signals workers again
        process.send_signal(signal.SIGTERM)
    assert run.end() != 0  # torch's launcher ends with an error whenever it is signalled
    assert "To go on:" in run.output
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    python("-m", "accel_moe.consolidate", "--inspect", checkpoint)


@pytest.mark.slow
def test_a_second_sigterm_ends_a_rank_that_waits_in_a_collective(base, tmp_path):
    run = Run(words_of("train_trainer.py", base, tmp_path, save_every=2))
    silent, waiting = run.workers
    silent.suspend()
    try:
        time.sleep(1)
        waiting.send_signal(signal.SIGTERM)
        time.sleep(3)
        waiting.send_signal(signal.SIGTERM)
        time.sleep(2)
        assert not waiting.is_running() or waiting.status() == psutil.STATUS_ZOMBIE
    finally:
        silent.kill()
    assert run.end() != 0
    assert "a second SIGTERM: the process ends at once" in run.output and "143" in run.output, run.output
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    python("-m", "accel_moe.consolidate", "--inspect", newest)
