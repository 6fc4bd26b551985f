"""DCP's `.metadata` is a pickle: whoever wrote it, opening a checkpoint runs nothing of it."""

from __future__ import annotations

import os
import pickle

import pytest
import torch.distributed.checkpoint as dist_cp

from accel_moe.checkpoint.dcp_read import FolderReader
from accel_moe.checkpoint.manifest import read_manifest
from accel_moe.checkpoint.tensor_reader import TensorReader
from accel_moe.errors import CheckpointError
from tests.exports import make_trained, one_line_error, run, write_manifest_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class _Trap:
    """Unpickled, it makes a folder; a real one would do worse."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def trapped(tmp_path):
    """(checkpoint, base, the folder that appears if its .metadata is unpickled)."""
    checkpoint, base, _ = make_trained(tmp_path, "qwen3_moe")
    return checkpoint, base, tmp_path / "sprung"


def set_trap(checkpoint, sprung):
    path = checkpoint / "pytorch_model_fsdp_0" / ".metadata"
    size_bytes = path.stat().st_size
    bytes_of_trap = pickle.dumps(_Trap(sprung))
    path.write_bytes(bytes_of_trap + b"\0" * (size_bytes - len(bytes_of_trap)))  # of the size that the manifest says


@pytest.mark.core
@pytest.mark.parametrize("command", ["consolidate", "--inspect", "--sizes-only"])
def test_a_metadata_file_that_is_not_the_manifests_is_refused_before_it_is_unpickled(
    tmp_path, trapped, capsys, command
):
    checkpoint, base, sprung = trapped
    write_manifest_of(checkpoint)
    set_trap(checkpoint, sprung)
    args = {
        "consolidate": [checkpoint, tmp_path / "out", base],
        "--inspect": ["--inspect", checkpoint],
        "--sizes-only": ["--sizes-only", checkpoint, tmp_path / "out", base],
    }[command]
    line = one_line_error(capsys, *args)
    assert ".metadata" in line and "does not match its checksum" in line
    assert not sprung.exists() and not (tmp_path / "out").exists()


@pytest.mark.core
@pytest.mark.parametrize("vouched", [True, False])
def test_a_metadata_file_that_names_a_function_is_refused_whoever_vouches_for_it(tmp_path, trapped, capsys, vouched):
    checkpoint, base, sprung = trapped
    if vouched:
        write_manifest_of(checkpoint)
        manifest = (checkpoint / "accel_moe_manifest.json").read_text()
    set_trap(checkpoint, sprung)
    if vouched:  # a manifest that was made to fit
        from accel_moe.checkpoint.checksums import file_digest

        old = read_manifest(checkpoint)
        entry = old.files[0]["pytorch_model_fsdp_0/.metadata"]
        digest = file_digest(checkpoint / "pytorch_model_fsdp_0" / ".metadata", old.digest_algorithm)
        object.__setattr__(entry, "digest", digest)
        (checkpoint / "accel_moe_manifest.json").write_text(old.to_json())
        assert (checkpoint / "accel_moe_manifest.json").read_text() != manifest
    line = one_line_error(capsys, checkpoint, tmp_path / "out", base)
    assert ".mkdir" in line and "was not called" in line
    assert not sprung.exists()


def test_the_reader_that_resumes_training_unpickles_nothing_foreign_either(trapped):
    checkpoint, _, sprung = trapped
    set_trap(checkpoint, sprung)
    with pytest.raises(CheckpointError, match="mkdir"):
        FolderReader([checkpoint / "pytorch_model_fsdp_0"]).read_metadata()
    assert not sprung.exists()


def test_a_metadata_file_that_the_manifest_does_not_list_is_refused(trapped):
    checkpoint, _, _ = trapped
    write_manifest_of(checkpoint)
    manifest = read_manifest(checkpoint)
    del manifest.files[0]["pytorch_model_fsdp_0/.metadata"]
    with pytest.raises(CheckpointError, match="manifest does not list it"):
        TensorReader([checkpoint / "pytorch_model_fsdp_0"], manifest)


def test_what_dcp_itself_writes_is_read_as_dcp_reads_it(tmp_path, trapped):
    folder = trapped[0] / "pytorch_model_fsdp_0"
    ours, theirs = FolderReader([folder]).read_metadata(), dist_cp.FileSystemReader(folder).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data and ours.planner_data == theirs.planner_data
    write_manifest_of(trapped[0])
    assert run("--verify", trapped[0], tmp_path / "out", trapped[1]) == 0
