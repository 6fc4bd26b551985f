"""Calls that all ranks must make: one that is missing is named within seconds, one that is slow is waited for."""

from __future__ import annotations

import pytest

from tests.distributed import whereabouts_runs as runs
from tests.ranks import run_ranks


def test_save_model_on_the_main_rank_alone_says_so_within_seconds(tmp_path):
    error, took = run_ranks(runs.save_model_on_the_main_rank, 2, str(tmp_path), timeout_s=90)[0]
    assert "Trainer.save_model is called by every rank, and rank 1 is not there" in error
    assert "rank 1 waiting in Accelerator.wait_for_everyone" in error and "is_world_process_zero" in error
    assert took < 15


def test_every_call_of_all_ranks_names_the_rank_that_did_not_make_it(tmp_path):
    names = (
        "save_state",
        "load_state",
        "get_state_dict",
        "get_state_dict",
        "tokens_per_expert",
        "evaluation, generation",
    )
    errors, _ = run_ranks(runs.calls_of_one_rank, 2, str(tmp_path), timeout_s=90)
    assert len(errors) == len(names)
    for name, error in zip(names, errors):
        assert name in error and "rank 1 is not there" in error and "wait_for_everyone" in error, (name, error)


def test_a_rank_that_is_only_slow_is_waited_for_and_forwards_ask_nothing_of_the_store():
    for rank, (heard, asked) in enumerate(run_ranks(runs.a_rank_that_is_slow, 2, 1.5, timeout_s=90)):
        assert asked == 0
        if rank == 0:
            (line,) = heard
            assert "save_state" in line and "rank 1 is not there" in line and "it is waited for" in line
        else:
            assert not heard


@pytest.mark.slow
def test_a_save_that_ends_at_the_timeout_says_what_every_rank_was_doing(tmp_path):
    error = run_ranks(runs.gone_while_others_save, 2, str(tmp_path), 8.0, timeout_s=120)[0]
    assert "last seen: rank 0 waiting in Accelerator.save_state" in error, error
    assert "rank 1 in a forward of the model (training), begun" in error


def test_ranks_are_listed_in_runs():
    from accel_moe.whereabouts import listed

    assert listed([1]) == "rank 1" and listed([3, 0, 1, 2, 6]) == "ranks 0-3, 6"
