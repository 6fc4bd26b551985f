"""Nodes with disks of their own: each writes its files, each reads what it has, and consolidate reads them all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accel_moe import consolidate
from accel_moe.checkpoint.manifest import read_manifest
from tests.distributed import node_runs as runs
from tests.distributed.parity import Case, build
from tests.ranks import free_port, run_ranks
from tests.tiny import tiny_model

CASE = Case(4, 2)
REPOSITORY = Path(__file__).resolve().parents[2]


# two launchers below, and the kills between two nodes' commits (test_checkpoint_kills.py), save at once
@pytest.fixture(
    scope="module", params=[pytest.param(False, marks=pytest.mark.slow), True], ids=["at once", "in the background"]
)
def saved(request, tmp_path_factory):
    """(root with node0/c and node1/c, end state) of four ranks on two nodes."""
    root = tmp_path_factory.mktemp("nodes")
    for node in (0, 1):
        (root / f"node{node}").mkdir()
    return root, run_ranks(runs.save, 4, CASE, str(root), 2, {"moe_async_save": request.param})[0]


def assert_same(got, want) -> None:
    assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)


def test_each_node_commits_what_its_ranks_wrote(saved):
    root, _ = saved
    manifests = [read_manifest(root / f"node{node}" / "c") for node in (0, 1)]
    assert manifests[0] == manifests[1] and [m.node for m in manifests] == [0, 1]
    for node, manifest in enumerate(manifests):
        on_disk = {
            p.relative_to(root / f"node{node}" / "c").as_posix()
            for p in (root / f"node{node}").rglob("*")
            if p.is_file()
        }
        assert on_disk == set(manifest.own_files()) | {"accel_moe_manifest.json"}
    assert "pytorch_model_fsdp_0/__3_0.distcp" in manifests[1].own_files()
    assert "pytorch_model_fsdp_0/__3_0.distcp" not in manifests[0].own_files()
    assert [p.name for node in (0, 1) for p in (root / f"node{node}").iterdir()] == ["c", "c"]


def test_the_same_ranks_resume_from_their_own_disks(saved):
    root, taken = saved
    for error, loaded in run_ranks(runs.load, 4, CASE, str(root), 2, False):
        assert not error
        assert_same(loaded.weights, taken.weights)
        assert_same(loaded.moments, taken.moments)


def test_ranks_that_need_what_another_node_has_are_told_the_file_and_the_node(saved):
    root, _ = saved
    for error, _ in run_ranks(runs.load, 4, CASE, str(root), 2, True):
        assert error.startswith("CheckpointError") and "written by node" in error and ".distcp" in error, error


def test_one_folder_with_the_files_of_both_nodes_loads_anywhere(saved, tmp_path):
    root, taken = saved
    for node in (1, 0):
        shutil.copytree(root / f"node{node}" / "c", tmp_path / "node0" / "c", dirs_exist_ok=True)
    error, loaded = run_ranks(runs.load, 2, Case(2, 2), str(tmp_path), 2, False)[0]
    assert not error, error
    assert_same(loaded.weights, taken.weights)


def test_consolidate_reads_the_folders_of_both_nodes_and_names_the_one_that_is_missing(saved, tmp_path, capsys):
    root, taken = saved
    model = build(CASE)
    model.save_pretrained(tmp_path / "base")
    model.load_state_dict(taken.weights)
    model.save_pretrained(tmp_path / "expected")
    folders = [str(root / f"node{node}" / "c") for node in (0, 1)]
    assert consolidate.main(["--verify", *folders, str(tmp_path / "out"), str(tmp_path / "base")]) == 0
    assert_same(*(load_file(tmp_path / f / "model.safetensors") for f in ("out", "expected")))
    capsys.readouterr()
    assert consolidate.main([folders[0], str(tmp_path / "half"), str(tmp_path / "base")]) == 1
    told = capsys.readouterr().err
    assert "written by node 1" in told and not (tmp_path / "half").exists()


YAML = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 2
num_processes: 2
machine_rank: 0
main_process_ip: 127.0.0.1
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Qwen3MoeDecoderLayer
  fsdp_state_dict_type: SHARDED_STATE_DICT
parallelism_config:
  parallelism_config_dp_shard_size: 2
  moe_ep_degree: 2
"""


def launch_on_two_nodes(root, what: str) -> None:
    """Two launchers, one for each machine rank, as on two machines; the ranks share experts across them."""
    port = free_port()
    (root / "config.yaml").write_text(YAML)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]), "OMP_NUM_THREADS": "1"}
    launchers = []
    for node in (0, 1):
        (root / f"node{node}").mkdir(exist_ok=True)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(root / "config.yaml")]
        command += ["--machine_rank", str(node), "--main_process_port", str(port)]
        command += [str(REPOSITORY / "tests/distributed/node_script.py"), str(root / f"node{node}"), what]
        launchers.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    for node, launcher in enumerate(launchers):
        assert launcher.returncode == 0, f"node {node}:\n{said[node][-4000:]}"


@pytest.mark.launch
@pytest.mark.slow
def test_two_launchers_save_resume_and_consolidate(tmp_path):
    launch_on_two_nodes(tmp_path, "save")
    for node in (0, 1):  # the first of two checkpoints is gone, on each disk
        assert [p.name for p in (tmp_path / f"node{node}" / "checkpoints").iterdir()] == ["checkpoint_1"]
    launch_on_two_nodes(tmp_path, "resume")
    saved, resumed = (json.loads((tmp_path / "node0" / f"{what}-0.json").read_text()) for what in ("save", "resume"))
    assert resumed["losses"] == saved["losses"][2:] and resumed["lr"] == saved["lr"]
    tiny_model().save_pretrained(tmp_path / "base")
    folders = [str(tmp_path / f"node{node}" / "checkpoints" / "checkpoint_1") for node in (1, 0)]
    assert consolidate.main(["--verify", *folders, str(tmp_path / "out"), str(tmp_path / "base")]) == 0
