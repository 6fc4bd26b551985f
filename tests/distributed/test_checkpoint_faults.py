"""Everything that can go wrong with a checkpoint: the right error on every rank, and the last good one loads."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from tests import ranks
from tests.distributed import fault_runs as runs
from tests.ranks import run_ranks

# --- damaged files -----------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


DAMAGE = {
    "missing": lambda path, other: path.unlink(),
    "empty": lambda path, other: path.write_bytes(b""),
    "truncated": lambda path, other: truncate(path),
    "flipped": lambda path, other: flip(path),
    "swapped": lambda path, other: shutil.copyfile(other, path),
}
ROLES = (
    "pytorch_model_fsdp_0/__1_0.distcp",
    "pytorch_model_fsdp_0/.metadata",
    "optimizer_0/__0_0.distcp",
    "optimizer_0/.metadata",
    "random_states_1.pkl",
    "scheduler.bin",
    "custom_checkpoint_0.pkl",
    "accel_moe_manifest.json",
)


def test_damage_to_any_file_is_refused_on_every_rank_before_the_model_is_touched(tmp_path):
    run_ranks(runs.save_steps, 2, str(tmp_path), [1, 2])
    good, other = (tmp_path / "checkpoints" / f"checkpoint_{step}" for step in (1, 2))
    for path in ROLES:
        assert (good / path).is_file(), f"{path}: the checkpoint has {sorted(p.name for p in good.iterdir())}"
    same = [path for path in ROLES if (good / path).read_bytes() == (other / path).read_bytes()]
    cases = [(role, damage) for role in ROLES for damage in DAMAGE if not (damage == "swapped" and role in same)]
    for i, (role, damage) in enumerate(cases):
        shutil.copytree(good, tmp_path / f"d{i}")
        DAMAGE[damage](tmp_path / f"d{i}" / role, other / role)
    folders = [str(tmp_path / f"d{i}") for i in range(len(cases))]
    per_rank = run_ranks(runs.load_each, 2, [*folders, str(good)])
    for results in per_rank:
        for (role, damage), (kind, text, untouched) in zip(cases, results):
            assert kind == "CheckpointError" and untouched, (role, damage, kind, text)
            named = role.rpartition("/")[2] in text
            assert named or (("manifest" in text or "is damaged" in text) and "manifest" in role), (role, damage, text)
        assert results[-1][1] == "loaded step 1"
    assert per_rank[0][:-1] == per_rank[1][:-1]  # word for word the same on both


# --- a save that fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", ["file size limit on one rank", "small files fail on one rank"])
def test_a_write_that_fails_on_one_rank_is_raised_on_all_and_the_last_checkpoint_loads(tmp_path, fault, background):
    for kind, text, loaded in run_ranks(runs.fail_to_save, 2, str(tmp_path), fault, {"moe_async_save": background}):
        assert kind == "CheckpointError" and "rank 1" in text, (kind, text)
        assert loaded == 1
    assert sorted(os.listdir(tmp_path)) == ["c"]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 3 MB; skips where that cannot be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_told_on_every_rank_and_the_last_checkpoint_loads(small_disk, background):
    options = {"moe_async_save": background}
    for kind, text, loaded in run_ranks(runs.fail_to_save, 2, str(small_disk), "full disk", options):
        assert kind == "CheckpointError" and "No space left" in text, (kind, text)
        assert "is full (" in text and "Free space, or save elsewhere" in text and "Checkpoints there: c (" in text
        assert loaded == 1


def test_a_folder_that_cannot_be_written_is_told_on_every_rank(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for kind, text in run_ranks(runs.save_into, 2, str(small_disk / "c")):
        assert kind == "CheckpointError" and "Read-only" in text


def test_a_file_in_the_way_is_told_on_every_rank(tmp_path):
    (tmp_path / "c").write_text("a file")
    for kind, text in run_ranks(runs.save_into, 2, str(tmp_path / "c")):
        assert kind == "CheckpointError" and "is a file, expected a folder" in text
    assert (tmp_path / "c").read_text() == "a file"


def test_two_jobs_that_save_to_one_folder_leave_one_whole_checkpoint(tmp_path):
    failures = []

    def job(step: int) -> None:
        try:
            run_ranks(runs.save_once, 2, str(tmp_path), step, 6)
        except AssertionError as error:
            failures.append(error)

    jobs = [threading.Thread(target=job, args=(step,)) for step in (11, 22)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    assert not failures, failures
    assert os.listdir(tmp_path) == ["c"]
    assert run_ranks(runs.load_one, 2, str(tmp_path), True)[0] in (11, 22)


def test_rotation_keeps_the_newest_and_leaves_alone_what_it_does_not_know(tmp_path):
    (tmp_path / "checkpoints" / "checkpoint_0").mkdir(parents=True)
    run_ranks(runs.save_steps, 2, str(tmp_path), [1, 2, 3, 10], 2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["checkpoint_0", "checkpoint_10", "checkpoint_3"]


def test_a_background_failure_that_nobody_heard_of_makes_the_process_fail():
    program = """
from concurrent.futures import Future
from accel_moe.checkpoint import background
background._background = Future()
background._background.set_exception(OSError(28, "No space left on device"))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 1 and "No space left on device" in ran.stderr


# --- killed ranks ------------------------------------------------------------------------------------------------


class Job:
    """Two ranks that save without end, as processes to be killed."""

    def __init__(self, folder, options: dict, one_name: bool):
        self.marks = folder / "marks"
        self.marks.mkdir(exist_ok=True)
        for mark in self.marks.glob("ready-*"):
            mark.unlink()
        self.logs = tempfile.mkdtemp()
        context = ranks._context()
        port = ranks.free_port()
        arguments = (str(folder), options, one_name)
        self.processes = [
            context.Process(
                target=ranks._child,
                args=(runs.keep_saving, arguments, rank, 2, port, self.logs, False, {}),
                daemon=True,
            )
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def wait_until_it_saves(self, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while len(list(self.marks.glob("ready-*"))) < 2 or not (self.marks / "promised").exists():
            assert all(p.is_alive() for p in self.processes), ranks._logs(self.logs)
            assert time.monotonic() < deadline, ranks._logs(self.logs)
            time.sleep(0.01)

    def end(self, which: list[int], sent: int, timeout_s: float = 60) -> None:
        """Signals some ranks; every rank must end by itself, and none with success.

        Ctrl-C is sent again every 10 s, as a person would press it: Python drops an interrupt that arrives inside a
        finaliser or a callback from C. After 30 s comes SIGTERM, as torchrun's agent sends it: a rank that was
        interrupted leaves its peer in a collective, where Python cannot see a signal. Killed ranks get neither.
        """
        deadline = time.monotonic() + timeout_s
        give_up = time.monotonic() + 30
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            for rank in which:
                if self.processes[rank].is_alive():
                    late = sent == signal.SIGINT and time.monotonic() > give_up
                    os.kill(self.processes[rank].pid, signal.SIGTERM if late else sent)
            pause = min(time.monotonic() + 10, deadline)
            while any(process.is_alive() for process in self.processes) and time.monotonic() < pause:
                time.sleep(0.05)
        alive = [process for process in self.processes if process.is_alive()]
        for process in alive:
            process.kill()
        assert not alive, f"still running {timeout_s} s after a rank was lost\n{ranks._logs(self.logs)}"
        assert all(process.exitcode != 0 for process in self.processes)
        shutil.rmtree(self.logs)


def kill_again_and_again(folder, seed: int, times: int, options: dict, one_name: bool) -> None:
    """Each job resumes from what the last one left, which checks that nothing was lost or mixed."""
    chance = random.Random(seed)
    for _ in range(times):
        job = Job(folder, options, one_name)
        job.wait_until_it_saves()
        time.sleep(chance.uniform(0.0, 0.6))
        job.end(chance.choice([[0], [1], [0, 1]]), signal.SIGKILL)
    loaded = run_ranks(runs.load_one, 2, str(folder), one_name)[0]
    assert loaded >= int((folder / "marks" / "promised").read_text())


@pytest.mark.parametrize(
    "one_name", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["onto one name", "numbered"]
)
def test_killed_ranks_leave_the_last_checkpoint_whole(tmp_path, one_name):
    kill_again_and_again(tmp_path, seed=int(one_name), times=2, options={}, one_name=one_name)


def test_ranks_killed_during_a_background_save_leave_the_last_checkpoint_whole(tmp_path):
    kill_again_and_again(tmp_path, seed=2, times=2, options={"moe_async_save": True}, one_name=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(4))
def test_sixty_kills_at_random_points_lose_nothing(tmp_path, seed):
    options = {"moe_async_save": bool(seed % 2)}
    kill_again_and_again(tmp_path, seed=100 + seed, times=15, options=options, one_name=seed < 2)


def test_a_save_interrupted_by_ctrl_c_leaves_the_last_checkpoint_whole(tmp_path):
    job = Job(tmp_path, {}, one_name=True)
    job.wait_until_it_saves()
    time.sleep(0.3)
    job.end([0, 1], signal.SIGINT)
    promised = int((tmp_path / "marks" / "promised").read_text())
    assert run_ranks(runs.load_one, 2, str(tmp_path), True)[0] >= promised
