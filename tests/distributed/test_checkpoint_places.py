"""Where a save may go: any folder that can be written, and nothing that a save did not write is touched there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from accel_moe.checkpoint.manifest import read_manifest
from tests.distributed import kill_runs as runs
from tests.distributed import trainer_checkpoints
from tests.distributed.parity import Case
from tests.ranks import run_ranks

CASE = Case(2, 2)
FOREIGN = {
    "train.log": "log",
    "checkpoint_1/model.safetensors": "an earlier checkpoint",
    "pytorch_model_fsdp_0/notes.txt": "mine",
    "deep/er/data.bin": "data",
}


def put(folder, files=FOREIGN) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def tree(folder) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}


def assert_checkpoint_and(folder, files) -> None:
    """The folder has one whole checkpoint, these files with their contents, and nothing else."""
    manifest = read_manifest(folder)
    assert manifest is not None
    assert tree(folder) == {*manifest.own_files(), "accel_moe_manifest.json", *files}
    for name, content in files.items():
        assert (folder / name).read_text() == content


@pytest.mark.parametrize(
    "background", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["at once", "in the background"]
)
def test_a_folder_with_other_things_the_working_directory_and_symlinks_keep_what_is_theirs(tmp_path, background):
    put(tmp_path / "project")
    put(tmp_path / "work")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "dangling").symlink_to(tmp_path / "disk2" / "later")
    targets = ["project", "work", "link", "dangling"]
    saved = [str(tmp_path / name) if name != "work" else "." for name in targets]
    options = {"moe_async_save": background}
    for results in run_ranks(runs.save_load, 2, CASE, saved + saved, options, str(tmp_path / "work")):
        assert results == [("", step) for step in range(1, 9)]
    assert_checkpoint_and(tmp_path / "project", FOREIGN)
    assert_checkpoint_and(tmp_path / "work", FOREIGN)
    assert_checkpoint_and(tmp_path / "disk", {})
    assert_checkpoint_and(tmp_path / "disk2" / "later", {})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["dangling", "disk", "disk2", "link", "project", "work"]


@pytest.fixture
def volume(tmp_path):
    """A mounted volume in a folder that is mounted read-only; skips where that is not permitted."""
    outer = tmp_path / "opt"
    outer.mkdir()
    commands = [
        ["mount", "-t", "tmpfs", "tmpfs", str(outer)],
        ["mkdir", str(outer / "checkpoints")],
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(outer / "checkpoints")],
        ["mount", "-o", "remount,ro", str(outer)],
    ]
    for command in commands:
        if subprocess.run(command, capture_output=True).returncode:
            subprocess.run(["umount", "-R", "-l", str(outer)], capture_output=True)
            pytest.skip("no permission to mount a file system")
    yield outer / "checkpoints"
    subprocess.run(["umount", "-R", "-l", str(outer)], check=True)


def test_a_mount_point_whose_parent_is_read_only_takes_a_save_and_its_parent_is_refused_with_a_mend(volume):
    put(volume, {"lost+found/x": "theirs"})
    for results in run_ranks(runs.save_load, 2, CASE, [str(volume), str(volume), str(volume.parent / "other")], {}):
        assert results[:2] == [("", 1), ("", 2)], results
        error, _ = results[2]
        assert "Read-only file system" in error and "is mounted read-only: remount it, or save elsewhere" in error
    assert_checkpoint_and(volume, {"lost+found/x": "theirs"})


def test_a_file_system_without_fsync_of_folders_and_without_flock_takes_a_save_with_one_warning_each(tmp_path):
    told = run_ranks(runs.save_on_an_odd_file_system, 2, str(tmp_path / "c"))[0]
    assert len(told) == 2 and any("flock" in t for t in told) and any("fsync of a folder" in t for t in told), told
    assert_checkpoint_and(tmp_path / "c", {})


def train(folder, steps):
    _, names = trainer_checkpoints.train(CASE, folder, {}, None, save_total_limit=2, max_steps=steps)
    return names


def test_a_fresh_run_in_a_folder_with_higher_numbers_keeps_its_newest_checkpoints(tmp_path):
    run_ranks(train, 2, str(tmp_path), 3)
    for number in (2, 3):  # as an earlier run left them
        (tmp_path / f"checkpoint-{number}").rename(tmp_path / f"checkpoint-{number + 10}")
    assert run_ranks(train, 2, str(tmp_path), 2)[0] == ["checkpoint-1", "checkpoint-2"]


def test_a_number_in_use_is_refused_with_an_advice_that_works(tmp_path):
    for said, names in run_ranks(runs.advised_number, 2, str(tmp_path)):
        assert "accelerator.project_configuration.iteration = 2" in said
        assert names == ["checkpoint_1", "checkpoint_2"]  # two are kept


def test_what_a_crash_loop_left_is_removed_before_a_save_so_that_it_does_not_fill_the_disk(volume):
    left = volume / "tmp-0-abcdefghijkl.c"  # of a container that is gone, on this machine
    left.mkdir()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    owner = {"host": f"{boot} pid:[1]", "pid": 7, "start": 1.0, "locked": True}
    (left / ".accel_moe_owner.json").write_text(json.dumps(owner))
    free = shutil.disk_usage(volume).free
    (left / "part").write_bytes(b"x" * (free - 100_000))
    for results in run_ranks(runs.save_load, 2, CASE, [str(volume / "c")], {}):
        assert results == [("", 1)]
    assert os.listdir(volume) == ["c"]
