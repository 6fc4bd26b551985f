"""A save that began is committed, however the script ends; and what runs beside it finds the folder whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import ranks
from tests.distributed import ending_runs as runs
from tests.distributed import fault_runs
from tests.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("how", [pytest.param("returns", marks=pytest.mark.slow), "destroys the process group"])
def test_a_background_save_outlives_a_script_that(how, tmp_path):
    assert run_ranks(runs.save_and_end, 2, str(tmp_path), how, timeout_s=90) == ["", ""]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.slow
@pytest.mark.parametrize("how, status", [("returns", 0), ("raises", 1), ("exits", 3), ("destroys", 0)])
def test_a_background_save_outlives_a_real_script_that(how, status, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"from tests.distributed import ending_runs\nending_runs.save_as_a_script({str(tmp_path)!r}, {how!r})"
    )
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port()), "WORLD_SIZE": "2"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]), "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [status, status], said
    assert (tmp_path / "checkpoint-1" / "accel_moe_manifest.json").is_file()


@pytest.mark.parametrize(
    "background", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["at once", "in the background"]
)
def test_sigterm_in_a_save_takes_effect_when_it_is_committed(background, tmp_path):
    """Two real processes and real signals, as torchrun's agent and a preempted machine send them."""
    with tempfile.TemporaryDirectory() as logs:
        port, context = ranks.free_port(), ranks._context()
        arguments = (str(tmp_path), {"moe_async_save": background}, 1.0)
        processes = [
            context.Process(
                target=ranks._child, args=(runs.save_until_a_signal, arguments, rank, 2, port, logs, False, {})
            )
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 120
        while not (tmp_path / "under-way-0").exists():  # a save has a leader, which writes its manifest
            assert time.monotonic() < deadline and all(p.is_alive() for p in processes), ranks._logs(logs)
            time.sleep(0.01)
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        said = ranks._logs(logs)
    assert codes == [-signal.SIGTERM] * 2, said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "under-way-0"], said
    assert "SIGTERM: the save under way is finished first" in said
    assert run_ranks(fault_runs.load_one, 2, str(tmp_path), True)[0] == 2


def test_a_second_sigterm_ends_the_process_at_once():
    program = """
import os, signal, sys, threading, time
from accel_moe.checkpoint.background import ends_before_sigterm
@ends_before_sigterm
def save():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
save()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert ran.returncode == -signal.SIGTERM and "still here" not in ran.stdout


def test_sigterm_is_left_to_its_default_between_saves_and_to_a_handler_of_the_users():
    program = """
import signal
from accel_moe.checkpoint.background import ends_before_sigterm
@ends_before_sigterm
def save():
    return signal.getsignal(signal.SIGTERM)
assert callable(save())
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
def own(*_): pass
signal.signal(signal.SIGTERM, own)
assert save() is own and signal.getsignal(signal.SIGTERM) is own
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_on_save_is_given_the_committed_folder_and_what_it_writes_there_stays(background, tmp_path):
    found = run_ranks(runs.save_with_a_callback, 2, str(tmp_path), {"moe_async_save": background}, timeout_s=90)[0]
    assert len(found) == 2
    for names, kept in found:
        assert "accel_moe_manifest.json" in names and "trainer_state.json" in names and kept


def test_callbacks_that_leave_the_folder_alone_keep_a_save_in_the_background():
    from transformers import TrainerCallback
    from transformers.integrations import WandbCallback

    from accel_moe.checkpoint.for_trainer import uses_the_folder

    class Reads(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            pass

    idle, uploads = WandbCallback.__new__(WandbCallback), WandbCallback.__new__(WandbCallback)
    idle._log_model, uploads._log_model = "false", "checkpoint"
    assert [uses_the_folder(c) for c in (TrainerCallback(), Reads(), idle, uploads)] == [False, True, False, True]


def test_train_ends_well_when_the_best_checkpoint_is_the_last_and_still_in_the_background(tmp_path):
    assert run_ranks(runs.best_at_the_end, 2, str(tmp_path), {"moe_async_save": True}, timeout_s=90)[0] == [
        "checkpoint-3"
    ]
