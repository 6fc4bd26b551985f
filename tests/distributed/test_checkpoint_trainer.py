"""Checkpoints through transformers.Trainer: one commit, rotation after it, resume from what was committed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from accel_moe.checkpoint.manifest import read_manifest
from tests.distributed import trainer_checkpoints as runs
from tests.distributed.parity import Case, build
from tests.ranks import run_ranks

CASE = Case(2, 2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder, end state) of three steps, each saved, two kept."""
    folder = tmp_path_factory.mktemp("trainer")
    taken, names = run_ranks(run_train, 2, CASE, str(folder), {}, None, {"save_total_limit": 2})[0]
    assert names == ["checkpoint-2", "checkpoint-3"]
    return folder, taken


def run_train(case, folder, options, resume, arguments):
    return runs.train(case, folder, options, resume, **arguments)


def assert_same_state(got, want) -> None:
    for mine, theirs in ((got.weights, want.weights), (got.moments, want.moments)):
        assert set(mine) == set(theirs)
        for name, tensor in theirs.items():
            assert torch.equal(mine[name], tensor), name


def test_a_resumed_run_ends_where_the_uninterrupted_one_did(uninterrupted, tmp_path):
    folder, whole = uninterrupted
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    again, _ = run_ranks(run_train, 2, CASE, str(tmp_path), {}, True, {})[0]
    assert_same_state(again, whole)
    assert again.losses == whole.losses


def test_resume_skips_a_folder_that_was_never_committed(uninterrupted, tmp_path):
    folder, whole = uninterrupted
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(folder / "checkpoint-3", tmp_path / "tmp-0-abcdefghijkl.checkpoint-3")
    (tmp_path / "checkpoint-9").mkdir()
    again, _ = run_ranks(run_train, 2, CASE, str(tmp_path), {}, True, {})[0]
    assert_same_state(again, whole)
    told = " ".join(again.told)
    assert "resuming from checkpoint-2" in told and "checkpoint-3 was never finished" in told
    assert "checkpoint-9 has no manifest" in told


def test_background_saves_are_committed_when_train_returns(uninterrupted, tmp_path):
    _, whole = uninterrupted
    taken, names = run_ranks(
        run_train, 2, CASE, str(tmp_path), {"moe_async_save": True}, None, {"save_total_limit": 1}
    )[0]
    assert names == ["checkpoint-3"]
    assert_same_state(taken, whole)
    again, _ = run_ranks(run_train, 2, CASE, str(tmp_path), {}, str(tmp_path / "checkpoint-3"), {"max_steps": 3})[0]
    assert_same_state(again, whole)


def test_the_commit_holds_the_trainer_state_and_the_step(uninterrupted):
    folder, _ = uninterrupted
    manifest = read_manifest(folder / "checkpoint-3")
    assert manifest.step == 3
    assert {"trainer_state.json", "scheduler.pt", "rng_state_1.pth"} <= set(manifest.own_files())


def test_the_best_checkpoint_is_known_by_its_committed_name_and_survives_rotation(tmp_path):
    arguments = {
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # the first evaluation is then the best
    }
    _, names = run_ranks(run_train, 2, CASE, str(tmp_path), {}, None, arguments)[0]
    assert "checkpoint-1" in names
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")


def test_save_model_gives_the_whole_weights_although_the_state_dict_type_is_sharded(tmp_path):
    weights = run_ranks(runs.save_whole_model, 2, CASE, str(tmp_path))[0]
    model = build(CASE)
    model.load_state_dict(weights)
    model.save_pretrained(tmp_path / "expected")
    got, want = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "expected"))
    assert set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want)
