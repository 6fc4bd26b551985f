"""The commit: killed before any event one of old and new is there at once, nothing foreign is touched, nothing is left.

Here a save is a few small files with a real manifest; tests/distributed/test_checkpoint_kills.py does the same with
real saves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import stat
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from accel_moe.checkpoint import advice, durable, folders, node_local, transaction
from accel_moe.checkpoint.checksums import file_digest
from accel_moe.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, read_manifest
from accel_moe.checkpoint.manifest import write_manifest as write
from accel_moe.errors import CheckpointError
from tests.kills import every_event

FOREIGN = {"train.log": "log", "epoch_0/predictions.json": "{}", "model_0/notes.txt": "mine", "model_0/deep/x": "x"}
OLD = ("model_0/.metadata", "model_0/__0_0.distcp", "model_0/__1_0.distcp", "random_1.pkl", "gone/only_here.bin")
NEW = ("model_0/.metadata", "model_0/__0_0.distcp", "random_0.pkl", "added/deep/new.bin")


@pytest.fixture(autouse=True)
def let_go():
    yield
    folders.release_all()


def put(folder, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def seal(folder, names, content: str) -> None:
    put(folder, dict.fromkeys(names, content))
    files = {name: FileEntry(len(content), content) for name in names}
    write(folder, Manifest(1, None, None, 1, 1, 1, 1, {}, "blake2b", ("a",), (files,), {}))


def filled(final, names=NEW, content="new"):
    """A sealed folder, as a save leaves it before its commit."""
    inside = final.is_dir()
    staging = folders.staging_name(final, folders.new_save_id(), inside=inside)
    folders.create_staging(staging)
    work = staging / final.name
    work.mkdir()
    seal(work, names, content)
    return work


def save(final, names=NEW, content="new", prefix=None) -> None:
    """All that a save does, as saving.py does it."""
    node_local.recover_everywhere(final, final.parent)
    folders.clean_abandoned(final.parent, final)
    work = filled(final, names, content)
    staging = work.parent
    work = transaction.commit(transaction.prepare(work, final), final)
    folders.release_all()
    transaction.move_into_place(work, final, staging)
    if prefix is not None:
        folders.rotate(final.parent, prefix, 1, final)
    folders.clean_abandoned(final.parent, final)


def content_of(folder) -> str:
    """The one content of all that the manifest lists; fails for a mixture."""
    manifest = read_manifest(folder)
    contents = {(folder / name).read_text() for name in manifest.own_files()}
    wanted = {entry.digest for entry in manifest.own_files().values()}
    assert contents == wanted and len(contents) == 1, f"a mixture: {contents}, the manifest says {wanted}"
    return contents.pop()


def tree(folder) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def foreign_is_there(folder) -> None:
    for name, content in FOREIGN.items():
        assert (folder / name).read_text() == content


# --- killed before every event -----------------------------------------------------------------------------------


EVENTS = pytest.mark.parametrize("first, stride", [(1, 4), pytest.param(1, 1, marks=pytest.mark.slow)])


@EVENTS
def test_killed_before_any_event_of_a_save_onto_an_old_name_old_or_new_is_there_at_once(tmp_path, first, stride):
    start = tmp_path / "start"
    put(start / "c", FOREIGN)
    seal(start / "c", OLD, "old")
    (tmp_path / "run").mkdir()
    final = tmp_path / "run" / "c"
    shutil.copytree(start / "c", final)
    seen = {"old": 0, "new": 0}
    for _ in every_event(lambda: save(final), first, stride):
        transaction.recover(final)
        seen[content_of(final)] += 1
        foreign_is_there(final)
        save(final, content="next")
        assert content_of(final) == "next"
        assert tree(tmp_path / "run") == {f"c/{n}" for n in (*FOREIGN, *NEW, MANIFEST_NAME)}, "something is left"
        shutil.rmtree(final)
        shutil.copytree(start / "c", final)
    assert seen["old"] * stride > 15 and seen["new"] * stride > 15, seen


@EVENTS
def test_killed_before_any_event_of_a_save_under_a_fresh_name_nothing_committed_is_lost(tmp_path, first, stride):
    outcomes = set()

    def save_two() -> None:
        save(tmp_path / "c" / "checkpoint_2", prefix="checkpoint_")

    for _ in every_event(save_two, first, stride):
        transaction.recover_beside(tmp_path / "c")
        there = [path for path in folders.numbered(tmp_path / "c", "checkpoint_") if folders.is_committed(path)]
        outcomes.add(content_of(there[-1]) if there else None)
        save(tmp_path / "c" / "checkpoint_3", content="next", prefix="checkpoint_")
        assert os.listdir(tmp_path / "c") == ["checkpoint_3"]
        shutil.rmtree(tmp_path / "c")
        save(tmp_path / "c" / "checkpoint_1", content="old")
    assert outcomes == {None, "old", "new"}  # None: before the first one there was nothing


@EVENTS
def test_killed_again_and_again_in_its_recovery_the_new_one_comes_through(tmp_path, first, stride):
    final = tmp_path / "c"
    seal(final, OLD, "old")
    work = transaction.commit(transaction.prepare(filled(final), final), final)
    folders.release_all()
    assert work.parent.parent == final and folders.is_journaled(work.parent)
    shutil.copytree(final, tmp_path / "start")
    for _ in every_event(lambda: transaction.recover(final), first, stride):
        folders.clean_abandoned(tmp_path, final)  # which must not take what the journal names
        transaction.recover(final)
        assert content_of(final) == "new"
        folders.clean_abandoned(tmp_path, final)
        assert tree(final) == {*NEW, MANIFEST_NAME}
        shutil.rmtree(final)
        shutil.copytree(tmp_path / "start", final)


def test_two_that_finish_one_commit_at_once_do_no_harm_also_without_flock(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "lock", lambda descriptor, wait=False: None)
    for _ in range(20):
        final = tmp_path / "c"
        seal(final, OLD, "old")
        put(final, FOREIGN)
        transaction.commit(transaction.prepare(filled(final), final), final)
        errors = []

        def finish(final=final, errors=errors):
            try:
                transaction.recover(final)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=finish) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        transaction.recover(final)
        assert not errors and content_of(final) == "new"
        foreign_is_there(final)
        shutil.rmtree(final)


# --- what a commit touches ---------------------------------------------------------------------------------------


def test_a_commit_leaves_foreign_files_alone_and_removes_what_only_the_old_checkpoint_had(tmp_path):
    final = tmp_path / "c"
    put(final, FOREIGN)
    before = os.stat(final).st_ino
    save(final, OLD, "old")
    save(final, NEW, "new")
    assert content_of(final) == "new" and os.stat(final).st_ino == before
    assert tree(final) == {*FOREIGN, *NEW, MANIFEST_NAME}
    assert not (final / "gone").exists() and os.listdir(tmp_path) == ["c"]


def test_a_stock_checkpoint_in_the_folder_is_written_over_and_its_other_files_stay(tmp_path):
    final = tmp_path / "c"
    put(final, dict.fromkeys(OLD, "stock"))
    save(final)
    assert content_of(final) == "new" and tree(final) == {*OLD, *NEW, MANIFEST_NAME}


def test_a_damaged_old_manifest_makes_no_file_go_and_the_save_is_made(tmp_path):
    final = tmp_path / "c"
    seal(final, OLD, "old")
    (final / MANIFEST_NAME).write_text('{"digest": 1, "body": {"format_version": "x"}}')
    save(final)
    assert content_of(final) == "new" and set(OLD) <= tree(final)


@pytest.mark.parametrize("name, what", [("model_0", "is a file, and the save"), ("random_0.pkl", "is a folder, and")])
def test_something_foreign_where_a_file_must_go_is_refused_by_name_before_anything_is_moved(tmp_path, name, what):
    final = tmp_path / "c"
    seal(final, ["a"], "old")
    put(final, {name: "mine"} if "file" in what else {f"{name}/x": "mine"})
    before = tree(final)
    work = filled(final)
    with pytest.raises(CheckpointError, match=rf"{name} {what}"):
        transaction.prepare(work, final)
    transaction.discard(work, work.parent)
    assert tree(final) == before and content_of(final) == "old"


def test_a_folder_that_appears_while_the_save_is_filled_keeps_its_files(tmp_path):
    final = tmp_path / "c"
    for moment in ("before it is prepared", "after"):
        work = filled(final)
        if moment == "after":
            work = transaction.prepare(work, final)
        staging = work.parent
        put(final, FOREIGN)  # a callback's
        work = transaction.prepare(work, final) if moment != "after" else work
        work = transaction.commit(work, final)
        transaction.move_into_place(work, final, staging)
        assert content_of(final) == "new" and tree(final) == {*FOREIGN, *NEW, MANIFEST_NAME}
        assert os.listdir(tmp_path) == ["c"]
        shutil.rmtree(final)


def test_symlinks_are_followed_and_kept_also_one_that_leads_to_nothing_yet(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "disk" / "c")
    for content in ("first", "second"):
        save(transaction.resolved(tmp_path / "latest"), content=content)
        assert (tmp_path / "latest").is_symlink() and content_of(tmp_path / "disk" / "c") == content
    assert os.listdir(tmp_path / "disk") == ["c"]


def mount(*arguments) -> None:
    if subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode:
        pytest.skip("no permission to mount")


def test_a_mount_point_whose_parent_is_read_only_is_a_folder_like_any_other(tmp_path):
    outer = tmp_path / "outer"
    (outer / "volume").mkdir(parents=True)
    mount("-t", "tmpfs", "tmpfs", outer)
    try:
        (outer / "volume").mkdir()
        mount("-t", "tmpfs", "tmpfs", outer / "volume")
        try:
            mount("-o", "remount,ro", outer)
            for content in ("first", "second"):
                save(outer / "volume", content=content)
                assert content_of(outer / "volume") == content and tree(outer / "volume") == {*NEW, MANIFEST_NAME}
        finally:
            subprocess.run(["umount", "-l", str(outer / "volume")], check=True)
    finally:
        subprocess.run(["umount", "-l", str(outer)], check=True)


def test_a_folder_inside_that_lies_on_another_disk_is_written_by_copying(tmp_path):
    final = tmp_path / "c"
    (final / "model_0").mkdir(parents=True)
    mount("-t", "tmpfs", "tmpfs", final / "model_0")
    try:
        save(final)
        assert content_of(final) == "new" and tree(final) == {*NEW, MANIFEST_NAME}
    finally:
        subprocess.run(["umount", "-l", str(final / "model_0")], check=True)


def test_a_file_system_without_hard_links_commits_by_a_rename(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path / "c", OLD, "old")
    save(tmp_path / "c")
    assert content_of(tmp_path / "c") == "new" and tree(tmp_path / "c") == {*NEW, MANIFEST_NAME}


def test_a_folder_beside_that_may_not_be_looked_into_is_no_hindrance():
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        (Path(folder) / "lost+found").mkdir(mode=0o700)
        child = os.fork()
        if child == 0:
            try:
                os.seteuid(65534)
                save(Path(folder) / "c")
                save(Path(folder) / "c", content="again")
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert content_of(Path(folder) / "c") == "again"


# --- recovery ----------------------------------------------------------------------------------------------------


def test_what_an_older_version_left_between_its_two_renames_comes_back_at_once(tmp_path):
    """As accel_moe 0.1 left it: the old folder renamed, the new one sealed, its owner file gone."""
    seal(tmp_path / "old-0-abcdefghijkl.c", OLD, "old")
    seal(tmp_path / "tmp-0-abcdefghijkl.c", NEW, "new")
    assert folders.clean_abandoned(tmp_path) == []  # the only copies
    transaction.recover(tmp_path / "c")
    assert content_of(tmp_path / "c") == "old"
    save(tmp_path / "d")
    assert sorted(os.listdir(tmp_path)) == ["c", "d"]


def test_a_journal_whose_files_are_gone_is_refused_and_so_is_a_damaged_one(tmp_path):
    final = tmp_path / "c"
    seal(final, OLD, "old")
    work = transaction.commit(transaction.prepare(filled(final), final), final)
    shutil.rmtree(work)
    with pytest.raises(CheckpointError, match=r"was being replaced, and its new files .* are gone"):
        transaction.recover(final)
    (final / folders.JOURNAL_NAME).write_text('{"staging": "../elsewhere"}')
    with pytest.raises(CheckpointError, match="is damaged"):
        transaction.recover(final)


# --- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, words",
    [
        (errno.EDQUOT, "Free space, or save elsewhere"),
        (errno.EACCES, "Allow this user to write in"),
        (errno.EROFS, "mounted read-only"),
        (errno.EIO, "its server or the kernel's log"),
        (errno.ESTALE, "its server or the kernel's log"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENAMETOOLONG, "a shorter name"),
        (errno.ENOENT, "Something removed files"),
    ],
)
def test_every_error_of_the_operating_system_says_what_to_do(tmp_path, code, words):
    from accel_moe import ranks

    def failing():
        with advice.told_with_a_mend(tmp_path / "c"):
            raise OSError(code, os.strerror(code), "some/file")

    with pytest.raises(CheckpointError) as told:
        ranks.run_or_raise_everywhere("saving c", failing)
    assert os.strerror(code) in str(told.value) and "some/file" in str(told.value) and words in str(told.value)


def test_a_full_disk_names_what_takes_the_space(tmp_path):
    seal(tmp_path / "checkpoint_1", ["weights"], "x" * 5000)
    put(folders.staging_name(tmp_path / "c", "abcdefghijkl"), {"part": "x" * 70_000})
    told = advice.mend(errno.ENOSPC, tmp_path / "c")
    assert "tmp-0-abcdefghijkl.c (70.0 kB)" in told and "checkpoint_1 (" in told and "free)" in told


@pytest.mark.parametrize("numbers", [10, 1_000_000], ids=["a small file", "a large file"])
def test_a_full_disk_that_torch_save_met_is_called_so(tmp_path, numbers):
    import torch

    from accel_moe import ranks

    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path)
    try:
        with contextlib.suppress(OSError), open(tmp_path / "filler", "wb") as stream:
            while stream.write(b"x" * 4096):
                stream.flush()

        def failing():
            with advice.told_with_a_mend(tmp_path / "c"):
                torch.save(torch.zeros(numbers), tmp_path / "x")

        with pytest.raises(CheckpointError, match=rf"{tmp_path.parent} is full|{tmp_path} is full"):
            ranks.run_or_raise_everywhere("saving c", failing)
        with pytest.raises(OSError, match="No space left"):
            folders.create_staging(folders.staging_name(tmp_path / "c", "abcdefghijkl"))
        assert not folders._held and not folders.unfinished(tmp_path)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_the_journal_is_readable_and_gone_in_the_end(tmp_path):
    final = tmp_path / "c"
    seal(final, OLD, "old")
    work = transaction.commit(transaction.prepare(filled(final), final), final)
    entry = json.loads((final / folders.JOURNAL_NAME).read_text())
    assert final / entry["staging"] == work
    assert stat.S_ISREG(os.stat(final / folders.JOURNAL_NAME).st_mode)
    transaction.move_into_place(work, final, work.parent)
    assert not (final / folders.JOURNAL_NAME).exists()


def list_in_manifest(work, folder: str) -> None:
    manifest = read_manifest(work)
    found = {
        path.relative_to(work).as_posix(): FileEntry(path.stat().st_size, file_digest(path, manifest.digest_algorithm))
        for path in (work / folder).iterdir()
    }
    write(work, dataclasses.replace(manifest, files=({**manifest.files[0], **found},)))


@pytest.mark.parametrize("cut", ["in a commit", "by an older version"])
def test_consolidate_opens_a_checkpoint_whose_commit_was_cut_short(tmp_path, cut):
    """The weights are those of a plain DCP folder; what matters is that they are found under the name."""
    import torch
    import torch.distributed.checkpoint as dist_cp

    from accel_moe.checkpoint.opened import open_checkpoint

    final = tmp_path / "c"
    model, name = tmp_path / "saved" / "pytorch_model_fsdp_0", "__0_0.distcp"
    writer = dist_cp.FileSystemWriter(model)
    dist_cp.save({"model": {"weight": torch.arange(4.0)}}, storage_writer=writer, no_dist=True)
    if cut == "in a commit":
        seal(final, OLD, "old")
        work = filled(final)
        shutil.copytree(model, work / model.name)
        list_in_manifest(work, model.name)
        transaction.commit(transaction.prepare(work, final), final)
    else:
        shutil.copytree(model, tmp_path / "old-0-abcdefghijkl.c" / model.name)
    assert (final / model.name / name).exists() is False
    checkpoint = open_checkpoint([final])
    assert checkpoint.reader.tensors["weight"].shape == (4,) and (final / model.name / name).exists()
    assert os.listdir(tmp_path / "c") and not folders.leftovers(tmp_path, final)
