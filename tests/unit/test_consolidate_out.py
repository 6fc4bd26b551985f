"""Where consolidate may write: every OUT that a plain save_pretrained would take, and no work before a refusal."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from accel_moe.checkpoint import durable, export_out
from accel_moe.checkpoint.export_plan import plan_export
from accel_moe.checkpoint.export_write import write_export
from accel_moe.checkpoint.opened import open_checkpoint
from accel_moe.errors import CheckpointError
from accel_moe.weights.base_model import open_base
from tests.exports import assert_same_tensors, make_trained, one_line_error, read_weights, run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def trained(tmp_path):
    return make_trained(tmp_path, "qwen3_moe")


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def freeze(monkeypatch, parent):
    """No entry of `parent` can be made, renamed or removed: a read-only parent, or the mount point below it."""

    def refusing(real):
        def call(*paths, **options):
            named = [os.path.abspath(path) for path in paths if not isinstance(path, int) and "dir_fd" not in options]
            if any(os.path.dirname(path) == str(parent) for path in named):
                raise PermissionError(errno.EACCES, "Permission denied", str(paths[0]))
            return real(*paths, **options)

        return call

    for name in ("mkdir", "rename", "rmdir", "replace"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


@pytest.mark.core
@pytest.mark.parametrize("content", [[], ["lost+found"]])
def test_an_empty_out_whose_parent_cannot_be_written_is_filled_where_it_is(tmp_path, trained, monkeypatch, content):
    checkpoint, base, expected = trained
    out = tmp_path / "volume" / "out"
    out.mkdir(parents=True)
    for name in content:
        (out / name).mkdir()
    inode = out.stat().st_ino
    freeze(monkeypatch, out.parent)
    assert run("--verify", checkpoint, out, base) == 0
    assert_same_tensors(read_weights(out), expected)
    assert out.stat().st_ino == inode
    assert names_in(out) == names_in(base) | set(content)
    assert names_in(out.parent) == {"out"}


@pytest.mark.core
@pytest.mark.parametrize("there", [True, False])
def test_a_symlink_as_out_stays_one(tmp_path, trained, there):
    checkpoint, base, expected = trained
    target = tmp_path / "disk" / "target"
    target.parent.mkdir()
    if there:
        target.mkdir()
    (tmp_path / "out").symlink_to(target)
    assert run(checkpoint, tmp_path / "out", base) == 0
    assert (tmp_path / "out").is_symlink()
    assert_same_tensors(read_weights(target), expected)
    assert names_in(target.parent) == {"target"}


def test_the_working_directory_as_out(tmp_path, trained, monkeypatch):
    checkpoint, base, expected = trained
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(checkpoint, ".", base) == 0
    assert_same_tensors(read_weights(tmp_path / "here"), expected)


@pytest.mark.parametrize("stop_at", range(4))
def test_an_export_that_stops_while_its_files_move_up_goes_on(tmp_path, trained, monkeypatch, stop_at):
    checkpoint, base, expected = trained
    out = tmp_path / "out"
    out.mkdir()
    real, moved = os.rename, []

    def rename(source, target, **options):
        if os.path.dirname(target) == str(out):
            if len(moved) == stop_at:
                raise KeyboardInterrupt
            moved.append(target)
        return real(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    assert run(checkpoint, out, base) == 130
    assert not (out / "config.json").exists()
    monkeypatch.setattr(os, "rename", real)
    assert run("--verify", checkpoint, out, base) == 0
    assert_same_tensors(read_weights(out), expected)
    assert names_in(out) == names_in(base)


def test_what_someone_else_writes_into_out_meanwhile_is_not_touched(tmp_path, trained):
    checkpoint, base, _ = trained
    (tmp_path / "out").mkdir()
    plan = plan_export(open_checkpoint([checkpoint]), open_base(str(base)))
    with pytest.raises(CheckpointError, match=r"got config\.json meanwhile"):
        write_export(plan, tmp_path / "out", before_commit=lambda _: (tmp_path / "out/config.json").write_text("mine"))
    assert (tmp_path / "out" / "config.json").read_text() == "mine"


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test when a tensor or a checksum is read before the refusal."""
    from accel_moe.checkpoint import manifest

    def read(*_, **__):
        raise AssertionError("work was done first")

    monkeypatch.setattr(manifest, "file_digest", read)
    monkeypatch.setattr("accel_moe.checkpoint.tensor_reader.TensorReader.read", read)


@pytest.mark.core
def test_an_out_that_cannot_be_made_is_refused_before_any_work(tmp_path, trained, monkeypatch, capsys, no_work):
    checkpoint, base, _ = trained
    (tmp_path / "volume").mkdir()
    freeze(monkeypatch, tmp_path / "volume")
    line = one_line_error(capsys, checkpoint, tmp_path / "volume" / "out", base)
    assert "out cannot be written" in line and "Permission denied" in line and "exists, is empty" in line
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in one_line_error(capsys, checkpoint, tmp_path / "file" / "out", base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    assert "is not empty" in one_line_error(capsys, tmp_path / "nowhere", tmp_path / "full", base)


@pytest.mark.core
def test_a_disk_that_is_too_full_is_refused_before_any_work(tmp_path, trained, monkeypatch, capsys, no_work):
    checkpoint, base, _ = trained
    real = os.statvfs

    def statvfs(path):
        found = list(real(path))
        found[3] = found[4] = 2  # f_bfree, f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", statvfs)
    line = one_line_error(capsys, checkpoint, tmp_path / "out", base)
    assert "GB free" in line and "the result needs" in line
    assert names_in(tmp_path) == {"base", "checkpoint", "expected"}


def test_what_an_interrupted_export_left_counts_as_room(tmp_path, trained, monkeypatch):
    place = export_out.place_of(tmp_path / "out")
    place.staging.mkdir()
    (place.staging / "model.safetensors").write_bytes(b"x" * 300_000)
    free = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result([free[0], free[1], free[2], 0, 0, *list(free)[5:]]))
    export_out.check_room(place, 250_000)
    with pytest.raises(CheckpointError, match="the result needs"):
        export_out.check_room(place, 900_000)


@pytest.mark.core
@pytest.mark.parametrize(("call", "told"), [("flock", ["flock"]), ("fsync", ["fsync of a file", "fsync of a folder"])])
def test_a_file_system_without_locks_or_fsync_gets_one_warning_and_the_result(
    tmp_path, trained, monkeypatch, recwarn, call, told
):
    checkpoint, base, expected = trained
    monkeypatch.setattr(durable, "_told", set())

    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl if call == "flock" else os, call, unsupported)
    assert run(checkpoint, tmp_path / "out", base) == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)
    said = [str(w.message) for w in recwarn if "the file system refuses" in str(w.message)]
    assert len(said) == len(told) and all(any(f"refuses {what} (" in line for line in said) for what in told)
