"""Which checkpoint is loaded: one and the same on all ranks, of the right kind, with the bytes that were verified."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from accel_moe.names import MANIFEST_NAME
from tests.distributed import choice_runs as runs
from tests.distributed import fault_runs, trainer_checkpoints
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A folder with checkpoint_1 and checkpoint_2, every number in which is the step."""
    root = tmp_path_factory.mktemp("steps")
    run_ranks(fault_runs.save_steps, 2, str(root), [1, 2])
    return root / "checkpoints"


def test_ranks_that_were_given_two_checkpoints_load_neither(steps):
    folders = [str(steps / f"checkpoint_{step}") for step in (2, 1)]
    for error, step in run_ranks(runs.load_one_each, 2, folders, timeout_s=90):
        assert error.startswith("CheckpointError: the ranks were given different checkpoints"), error
        assert f"rank 0: {folders[0]} (step" in error and f"rank 1: {folders[1]} (step" in error
        assert step == -1


def test_copies_of_one_checkpoint_in_two_places_are_one(steps, tmp_path):
    shutil.copytree(steps / "checkpoint_2", tmp_path / "on-my-disk")
    folders = [str(steps / "checkpoint_2"), str(tmp_path / "on-my-disk")]
    assert run_ranks(runs.load_one_each, 2, folders, timeout_s=90) == [("", 2), ("", 2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trainer's folder of two steps, each saved."""
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(_train, 2, str(folder))
    return folder


def _train(folder):
    trainer_checkpoints.train(runs.CASE, folder, {}, max_steps=2)


def test_trainer_resumes_from_the_newest_that_all_ranks_have(trained, tmp_path):
    for rank, kept in enumerate(([1, 2], [1])):
        for step in kept:
            shutil.copytree(trained / f"checkpoint-{step}", tmp_path / f"disk{rank}" / f"checkpoint-{step}")
    for error, step in run_ranks(runs.resume_from_own_disks, 2, str(tmp_path), [True, True], timeout_s=90):
        assert not error and step == 1, (error, step)


def test_a_rank_that_would_start_anew_while_others_resume_is_told(trained, tmp_path):
    for rank in range(2):
        shutil.copytree(trained / "checkpoint-2", tmp_path / f"disk{rank}" / "checkpoint-2")
    for error, step in run_ranks(runs.resume_from_own_disks, 2, str(tmp_path), [True, None], timeout_s=90):
        assert "differs between ranks (rank 0: True; rank 1: False)" in error and step == 0


def test_the_other_state_dict_type_is_told_on_every_rank_and_hangs_none(tmp_path):
    for errors in run_ranks(runs.other_state_dict_types, 2, str(tmp_path), timeout_s=90):
        sharded, full = errors[:2], errors[2:]
        assert all("was saved with fsdp_state_dict_type: SHARDED_STATE_DICT (it has" in error for error in sharded)
        assert all("was saved with fsdp_state_dict_type: FULL_STATE_DICT (it has" in error for error in full)
        assert all("Set fsdp_state_dict_type" in error for error in errors)


def test_a_folder_without_the_file_that_rank_0_resumes_from_is_told_on_every_rank_and_hangs_none(tmp_path):
    for whole, empty in run_ranks(runs.resume_from_whole_weights, 2, str(tmp_path), timeout_s=90):
        assert "has no pytorch_model_fsdp.bin" in whole and "load it with from_pretrained" in whole
        assert "has no pytorch_model_fsdp.bin" in empty and "Use another checkpoint" in empty


def test_a_bit_that_flipped_after_the_best_checkpoint_was_loaded_is_seen_when_the_process_resumes(tmp_path):
    for error in run_ranks(runs.resume_what_was_flipped_since, 2, str(tmp_path), timeout_s=90):
        assert error.startswith("CheckpointError") and "does not match its checksum" in error, error


@pytest.mark.slow
def test_a_run_that_was_moved_finds_its_best_checkpoint_again(tmp_path):
    best, first = run_ranks(runs.train_with_best, 2, str(tmp_path / "before"), 2, None)[0]
    assert best == str(tmp_path / "before" / "checkpoint-1")
    (tmp_path / "before").rename(tmp_path / "moved")
    resume = str(tmp_path / "moved" / "checkpoint-2")
    best, weights = run_ranks(runs.train_with_best, 2, str(tmp_path / "moved"), 3, resume)[0]
    assert best == str(tmp_path / "moved" / "checkpoint-1")
    assert sorted(os.listdir(tmp_path / "moved")) == ["checkpoint-1", "checkpoint-3"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in first.items())
    state = json.loads((tmp_path / "moved" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


GONE = ["optimizer_0", "scheduler.bin", "random_states_0.pkl", "random_states_1.pkl", "custom_checkpoint_0.pkl"]


@pytest.mark.parametrize("deleted", [["optimizer_0"], GONE], ids=["the optimizer", "all but the model"])
def test_a_checkpoint_that_was_thinned_on_purpose_loads_when_it_is_said(deleted, steps, tmp_path):
    shutil.copytree(steps / "checkpoint_2", tmp_path / "c")
    for rank, (error, told, step, alone) in enumerate(
        run_ranks(runs.load_thinned, 2, str(tmp_path / "c"), deleted, "present", timeout_s=90)
    ):
        assert not error and step == 2 and alone, (error, step, alone)
        if rank == 0:
            assert any("was thinned" in text and "optimizer_0" in text and "not restored" in text for text in told)


def test_a_thinned_checkpoint_is_refused_by_default_with_the_option_that_loads_it(steps, tmp_path):
    shutil.copytree(steps / "checkpoint_2", tmp_path / "c")
    for error, _, step, _ in run_ranks(runs.load_thinned, 2, str(tmp_path / "c"), ["optimizer_0"], "checksums"):
        assert "is missing" in error and "moe_verify: present" in error and step == -1


def test_what_is_left_of_a_thinned_checkpoint_is_verified_and_no_dcp_folder_may_be_half_there(steps, tmp_path):
    shutil.copytree(steps / "checkpoint_2", tmp_path / "c")
    half = ["optimizer_0/__0_0.distcp", "scheduler.bin"]
    for error, _, step, _ in run_ranks(runs.load_thinned, 2, str(tmp_path / "c"), half, "present", timeout_s=90):
        assert "optimizer_0/__0_0.distcp is missing, and other files of optimizer_0 are there" in error and step == -1


def test_the_newest_whole_checkpoint_is_loaded_whoever_wrote_it(steps, tmp_path):
    parent = tmp_path / "checkpoints"
    shutil.copytree(steps, parent)
    run_ranks(runs.save_stock_step, 2, str(tmp_path), 3)
    assert not (parent / "checkpoint_3" / MANIFEST_NAME).exists()
    shutil.copytree(parent / "checkpoint_3", parent / "checkpoint_4")
    (parent / "checkpoint_4" / "optimizer_0" / ".metadata").unlink()
    shutil.copytree(parent / "checkpoint_2", parent / "checkpoint_5")
    (parent / "checkpoint_5" / MANIFEST_NAME).unlink()
    step, told = run_ranks(runs.load_newest, 2, str(tmp_path), timeout_s=90)[0]
    text = " ".join(told)
    assert step == 3
    assert "resuming from checkpoint_3. It has no manifest" in text and "newer than checkpoint_2" in text
    assert "checkpoint_4 has no manifest, and optimizer_0/.metadata is missing" in text
    assert "checkpoint_5 has no manifest, which was written with it" in text
