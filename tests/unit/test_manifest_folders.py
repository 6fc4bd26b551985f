"""Folders: what is committed, what is not, and that no order of events loses the last good checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from accel_moe.checkpoint import folders
from accel_moe.checkpoint.manifest import MANIFEST_NAME, CheckpointError

ID = "abcdefghijkl"


def committed(parent, name, content="new"):
    (parent / name).mkdir(parents=True)
    (parent / name / "weights").write_text(content)
    (parent / name / MANIFEST_NAME).write_text("{}")
    return parent / name


def staged(parent, name, save_id=ID, owner=True, content="new"):
    path = folders.staging_name(parent / name, save_id)
    folders.create_staging(path) if owner else path.mkdir()
    (path / "weights").write_text(content)
    return path


def owner(pid: int) -> str:
    return json.dumps({"host": folders._host(), "pid": pid, "start": 1.0})


def names(parent) -> list[str]:
    return sorted(p.name for p in parent.iterdir())


def test_commit_gives_the_folder_its_name_and_leaves_no_bookkeeping(tmp_path):
    folders.commit(staged(tmp_path, "c"), tmp_path / "c", ID)
    assert names(tmp_path) == ["c"] and names(tmp_path / "c") == ["weights"]


def test_commit_replaces_an_older_folder_of_the_same_name(tmp_path):
    committed(tmp_path, "c", "old")
    folders.commit(staged(tmp_path, "c"), tmp_path / "c", ID)
    assert names(tmp_path) == ["c"] and (tmp_path / "c" / "weights").read_text() == "new"


def test_the_older_folder_comes_back_when_the_commit_dies_between_its_renames(tmp_path, monkeypatch):
    committed(tmp_path, "c", "old")
    staging = staged(tmp_path, "c")
    (tmp_path / "c").rename(tmp_path / f"old-0-{ID}.c")  # here the process dies
    assert folders.recover(tmp_path) == []  # not while its writer, this process, lives
    (staging / folders._OWNER_NAME).write_text(owner(1))
    assert folders.recover(tmp_path) == ["c"]
    assert (tmp_path / "c" / "weights").read_text() == "old"


def test_a_failed_rename_puts_the_older_folder_back_at_once(tmp_path, monkeypatch):
    committed(tmp_path, "c", "old")
    with pytest.raises(OSError):
        staging = staged(tmp_path, "c")
        real = type(staging).rename

        def rename(self, target):
            if self == staging:
                raise OSError("disk gone")
            return real(self, target)

        monkeypatch.setattr(type(staging), "rename", rename)
        folders.commit(staging, tmp_path / "c", ID)
    assert (tmp_path / "c" / "weights").read_text() == "old"


def test_a_folder_in_use_is_left_alone_and_an_abandoned_one_is_removed(tmp_path):
    mine = staged(tmp_path, "checkpoint-1")
    dead = staged(tmp_path, "checkpoint-2", "bbbbbbbbbbbb")
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone = int(process.stdout)
    (dead / folders._OWNER_NAME).write_text(owner(gone))
    assert folders.clean_abandoned(tmp_path) == [dead.name]
    assert names(tmp_path) == [mine.name]


def test_a_folder_of_another_host_is_removed_only_after_a_day_without_a_write(tmp_path):
    path = staged(tmp_path, "c")
    (path / folders._OWNER_NAME).write_text('{"host": "elsewhere", "pid": 1, "start": 1.0}')
    assert folders.clean_abandoned(tmp_path) == []
    long_ago = time.time() - 2 * 24 * 3600
    for p in [*path.iterdir(), path]:
        os.utime(p, (long_ago, long_ago))
    assert folders.clean_abandoned(tmp_path) == [path.name]


def test_the_newest_committed_folder_wins_over_higher_numbers_that_are_not(tmp_path):
    committed(tmp_path, "checkpoint-9")
    committed(tmp_path, "checkpoint-10")
    (tmp_path / "checkpoint-11").mkdir()
    staged(tmp_path, "checkpoint-12")
    newest, passed_over = folders.newest_committed(tmp_path, "checkpoint-")
    assert newest == tmp_path / "checkpoint-10"
    assert any("checkpoint-12" in line for line in passed_over) and any("checkpoint-11" in line for line in passed_over)


def test_trainer_and_accelerate_alone_do_not_take_an_unfinished_folder_for_the_newest(tmp_path):
    import re

    from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

    committed(tmp_path, "checkpoint-9")
    staged(tmp_path, "checkpoint-12")
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
    assert folders.rotate(tmp_path, "checkpoint-", 2, [tmp_path / "checkpoint-1"]) == ["checkpoint-2", "checkpoint-3"]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-10", "checkpoint-4"]
    assert folders.rotate(tmp_path, "checkpoint-", None) == []


def test_an_unfinished_folder_is_refused_by_its_name(tmp_path):
    committed(tmp_path, "c")
    with pytest.raises(CheckpointError, match=r"never committed.*such as c"):
        folders.refuse_unfinished(staged(tmp_path, "c"))
    folders.refuse_unfinished(tmp_path / "c")
