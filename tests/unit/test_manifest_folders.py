"""Folders: what is committed, what is not, who fills them, and which of them a later save removes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import accel_moe
from accel_moe.checkpoint import durable, folders
from accel_moe.errors import CheckpointError
from accel_moe.names import MANIFEST_NAME

ID = "abcdefghijkl"


def committed(parent, name, content="new"):
    (parent / name).mkdir(parents=True)
    (parent / name / "weights").write_text(content)
    (parent / name / MANIFEST_NAME).write_text("{}")
    return parent / name


def staged(parent, name, save_id=ID, content="new"):
    """A folder that this process fills, with its lock held."""
    path = folders.staging_name(parent / name, save_id)
    folders.create_staging(path)
    (path / "weights").write_text(content)
    return path


@pytest.fixture(autouse=True)
def let_go():
    yield
    folders.release_all()


def owner(**changed) -> str:
    return json.dumps({"host": folders._host(), "pid": os.getpid(), "start": 1.0, "locked": True} | changed)


def age(path, seconds) -> None:
    then = time.time() - seconds
    for p in [*path.rglob("*"), path]:
        os.utime(p, (then, then))


def names(parent) -> list[str]:
    return sorted(p.name for p in parent.iterdir())


# --- who fills a folder ------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_left_alone_and_one_that_a_kill_left_is_removed_at_once(tmp_path):
    mine = staged(tmp_path, "checkpoint-1")
    program = f"""
import os, signal, sys
from pathlib import Path
from accel_moe.checkpoint import folders
folders.create_staging(Path({str(tmp_path)!r}) / "tmp-0-bbbbbbbbbbbb.checkpoint-2")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert "tmp-0-bbbbbbbbbbbb.checkpoint-2" in names(tmp_path)
    assert folders.clean_abandoned(tmp_path) == ["tmp-0-bbbbbbbbbbbb.checkpoint-2"]
    assert names(tmp_path) == [mine.name]


def test_a_container_that_was_restarted_finds_what_its_predecessor_left(tmp_path):
    path = staged(tmp_path, "c")
    folders.release_all()  # the predecessor died
    boot = folders._host().split()[0]
    (path / folders._OWNER_NAME).write_text(owner(host=f"{boot} pid:[1]"))
    assert folders.clean_abandoned(tmp_path) == [path.name]


def test_a_folder_of_another_machine_is_removed_after_a_quarter_of_an_hour_without_a_write(tmp_path):
    path = staged(tmp_path, "c")
    folders.release_all()
    (path / folders._OWNER_NAME).write_text(owner(host="elsewhere pid:[1]"))
    assert folders.clean_abandoned(tmp_path) == []
    age(path, 16 * 60)
    assert folders.clean_abandoned(tmp_path) == [path.name]


def test_a_folder_whose_lock_is_held_stays_however_old_it_is(tmp_path):
    path = staged(tmp_path, "c")
    age(path, 7 * 24 * 3600)
    assert folders.clean_abandoned(tmp_path) == [] and path.exists()


def refuse(monkeypatch, call, code):
    def refusing(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*call, refusing)


def test_without_flock_the_process_decides_and_elsewhere_an_hour_of_rest(tmp_path, monkeypatch):
    durable._told.clear()
    refuse(monkeypatch, (fcntl, "flock"), errno.EOPNOTSUPP)
    with pytest.warns(UserWarning, match=r"refuses flock .*: an abandoned save is recognised by its process"):
        mine = staged(tmp_path, "a")
    foreign = staged(tmp_path, "b", "bbbbbbbbbbbb")
    dead = staged(tmp_path, "c", "cccccccccccc")
    (foreign / folders._OWNER_NAME).write_text(owner(host="elsewhere pid:[1]", locked=False))
    (dead / folders._OWNER_NAME).write_text(owner(locked=False))  # this pid, but of another start
    assert folders.clean_abandoned(tmp_path) == [dead.name]
    age(foreign, 2 * 3600)
    assert folders.clean_abandoned(tmp_path) == [foreign.name]
    assert names(tmp_path) == [mine.name]


@pytest.mark.parametrize("left", ["nothing", "an owner file without a word"])
def test_what_a_kill_left_of_a_folder_that_was_just_made_is_removed_at_once(tmp_path, left):
    path = folders.staging_name(tmp_path / "c", ID)
    path.mkdir()
    if left != "nothing":
        (path / folders._OWNER_NAME).touch()
    folders.clean_abandoned(tmp_path)
    assert names(tmp_path) == []


def test_a_worker_that_was_forked_does_not_hold_the_lock(tmp_path):
    path = staged(tmp_path, "c")
    leave_r, leave_w = os.pipe()
    there_r, there_w = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(there_w, b"x")
        os.read(leave_r, 1)
        os._exit(0)
    os.read(there_r, 1)  # what the package does at a fork is done
    try:
        descriptor = next(iter(folders._held))
        folders._held.clear()
        os.close(descriptor)  # as a kill closes it: without unlocking
        (path / folders._OWNER_NAME).write_text(owner())
        assert folders.clean_abandoned(tmp_path) == [path.name]
    finally:
        os.write(leave_w, b"x")
        os.waitpid(child, 0)


def test_a_removal_that_was_killed_is_finished_by_the_next_cleaning(tmp_path):
    committed(tmp_path, f"del-0-{ID}.checkpoint-1")
    committed(tmp_path, "checkpoint-2")
    committed(tmp_path / "checkpoint-2", f"del-0-{ID}.checkpoint-2")
    folders.clean_abandoned(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"] and names(tmp_path / "checkpoint-2") == [MANIFEST_NAME, "weights"]


# --- file systems that refuse --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.ENOSYS])
def test_a_file_system_without_fsync_of_folders_is_told_once_and_refuses_nothing(tmp_path, monkeypatch, code):
    durable._told.clear()
    refuse(monkeypatch, (os, "fsync"), code)
    with pytest.warns(UserWarning, match="refuses fsync of a folder") as told:
        durable.fsync_folder(tmp_path)
        durable.fsync_folder(tmp_path)
    assert len(told) == 1


def test_a_disk_that_fails_in_fsync_is_no_weaker_promise_but_an_error(tmp_path, monkeypatch):
    refuse(monkeypatch, (os, "fsync"), errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        durable.fsync_folder(tmp_path)


# --- which checkpoints there are ---------------------------------------------------------------------------------


def test_the_newest_committed_folder_wins_over_higher_numbers_that_are_not(tmp_path):
    committed(tmp_path, "checkpoint-9")
    committed(tmp_path, "checkpoint-10")
    (tmp_path / "checkpoint-11").mkdir()
    staged(tmp_path, "checkpoint-12")
    with pytest.warns(UserWarning, match=r"checkpoint-12 was never finished; checkpoint-11 has no manifest"):
        newest = accel_moe.newest_checkpoint(str(tmp_path))
    assert newest == tmp_path / "checkpoint-10"


def test_a_run_without_a_whole_checkpoint_is_told_what_it_has(tmp_path):
    (tmp_path / "checkpoint-11").mkdir()
    with pytest.raises(CheckpointError, match=r"expected folders checkpoint-<number>, found checkpoint-11\. Start wi"):
        accel_moe.newest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="expected folders step_<number>, found nothing"):
        accel_moe.newest_checkpoint(tmp_path / "nowhere", prefix="step_")


def test_trainer_and_accelerate_alone_do_not_take_an_unfinished_folder_for_the_newest(tmp_path):
    import re

    from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

    committed(tmp_path, "checkpoint-9")
    staged(tmp_path, "checkpoint-12")
    (tmp_path / f"del-0-{ID}.checkpoint-13").mkdir()
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert sort_checkpoints(str(tmp_path)) == [str(tmp_path / "checkpoint-9")]

    def accelerates_number(folder):  # as in Accelerator.load_state
        return next(map(int, re.findall(r"[\/]?([0-9]+)(?=[^\/]*$)", folder)))

    paths = [str(p) for p in tmp_path.iterdir()]
    assert max(paths, key=accelerates_number) == str(tmp_path / "checkpoint-9")


def test_rotation_keeps_the_newest_and_the_protected_and_touches_nothing_else(tmp_path):
    for number in (1, 2, 3, 10):
        committed(tmp_path, f"checkpoint-{number}")
    (tmp_path / "checkpoint-4").mkdir()
    newest = tmp_path / "checkpoint-10"
    best = [tmp_path / "checkpoint-1"]
    assert folders.rotate(tmp_path, "checkpoint-", 2, newest, best) == ["checkpoint-2", "checkpoint-3"]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-10", "checkpoint-4"]
    assert folders.rotate(tmp_path, "checkpoint-", None, newest) == []


def test_rotation_goes_by_the_time_of_the_commit_and_never_deletes_what_was_just_committed(tmp_path):
    for ago, number in enumerate((1, 6, 5)):
        manifest = committed(tmp_path, f"checkpoint-{number}") / MANIFEST_NAME
        os.utime(manifest, (time.time() - 100 * ago, time.time() - 100 * ago))
    newest = tmp_path / "checkpoint-1"
    assert folders.rotate(tmp_path, "checkpoint-", 2, newest) == ["checkpoint-5"]
    for path in tmp_path.iterdir():
        os.utime(path / MANIFEST_NAME, (1.0, 1.0))  # a file system that keeps no times
    assert folders.rotate(tmp_path, "checkpoint-", 1, newest) == ["checkpoint-6"]
    assert names(tmp_path) == ["checkpoint-1"]


def test_an_unfinished_folder_is_refused_by_its_name(tmp_path):
    committed(tmp_path, "c")
    with pytest.raises(CheckpointError, match=r"never committed.*such as c"):
        folders.refuse_unfinished(staged(tmp_path, "c"))
    folders.refuse_unfinished(tmp_path / "c")
