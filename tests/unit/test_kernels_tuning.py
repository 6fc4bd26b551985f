"""Choosing tile sizes: the shipped table, the rule, and the cache that ranks share. No GPU: measuring is replaced."""

import json
import threading
from dataclasses import asdict

import pytest
import torch

from accel_moe.kernels import tuning
from accel_moe.kernels.tuning import Config, Problem

KERNELS = ("up", "down", "down_backward", "down_weight_grad", "up_weight_grad", "up_backward")
PROBLEM = Problem("up", 4096, 8, 512, 256, torch.bfloat16, (9, 0))
MEASURED = Config(128, 64, 64, 4, 3)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of its own, with measuring counted and replaced."""
    calls = []
    monkeypatch.setenv("SCATTERMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_INTERPRETED", False)
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setattr(tuning, "_fastest", lambda problem, launch: calls.append(problem) or MEASURED)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    calls_and_folder = type("Cache", (), {"calls": calls, "folder": tuning._cache_folder()})
    return calls_and_folder


def lock_of(cache, problem=PROBLEM):
    cache.folder.mkdir(parents=True, exist_ok=True)
    return cache.folder / (problem.key.replace(" ", "_") + ".lock")


def test_a_shape_is_measured_once_and_then_read_by_other_processes(cache):
    assert tuning.choose(PROBLEM, None) == MEASURED
    assert tuning.choose(PROBLEM, None) == MEASURED
    tuning._measured.clear()  # as another process
    assert tuning.choose(PROBLEM, None) == MEASURED
    assert len(cache.calls) == 1
    assert not lock_of(cache).exists()


def test_ranks_that_start_together_measure_once(cache, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(
        tuning, "_fastest", lambda problem, launch: cache.calls.append(problem) or (release.wait(10) and MEASURED)
    )
    found = []
    ranks = [threading.Thread(target=lambda: found.append(tuning._measure_or_wait(PROBLEM, None))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    release.set()
    for rank in ranks:
        rank.join()
    assert found == [MEASURED] * 4 and len(cache.calls) == 1


def test_a_rank_never_waits_longer_than_its_limit_for_another(cache, monkeypatch):
    monkeypatch.setattr(tuning, "WAIT_S", 0.2)
    lock_of(cache).touch()
    assert tuning._measure_or_wait(PROBLEM, None) == tuning.rule(PROBLEM)
    assert not cache.calls


def test_the_lock_of_a_dead_process_is_broken(cache, monkeypatch):
    import os

    lock_of(cache).touch()
    os.utime(lock_of(cache), (0, 0))
    assert tuning._measure_or_wait(PROBLEM, None) == MEASURED


def test_a_torn_or_foreign_entry_is_measured_again(cache):
    entry = lock_of(cache).with_suffix(".json")
    entry.write_text('{"block_p": 12')
    assert tuning._measure_or_wait(PROBLEM, None) == MEASURED
    entry.write_text(json.dumps({**asdict(MEASURED), "unknown": 1}))
    assert tuning._measure_or_wait(PROBLEM, None) == MEASURED
    assert len(cache.calls) == 2


def test_nothing_is_measured_under_capture_for_few_rows_or_when_switched_off(cache, monkeypatch):
    few = PROBLEM._replace(rows=8 * 8)
    assert tuning.choose(few, None) == tuning.rule(few)
    monkeypatch.setenv("SCATTERMOE_AUTOTUNE", "0")
    assert tuning.choose(PROBLEM, None) == tuning.rule(PROBLEM)
    monkeypatch.delenv("SCATTERMOE_AUTOTUNE")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.choose(PROBLEM, None) == tuning.rule(PROBLEM)
    assert not cache.calls


def test_a_cache_that_cannot_be_written_still_measures(cache, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("SCATTERMOE_CACHE", str(blocked))
    assert tuning.choose(PROBLEM, None) == MEASURED


def _shared_bytes(problem, config):
    """Operand tiles of all stages: what must fit a multiprocessor's shared memory."""
    width = config.block_n * (2 if problem.kernel == "up" else 1)
    if problem.kernel.endswith("_weight_grad"):
        tile = config.block_p * (config.block_n + config.block_k)
    else:
        tile = config.block_k * (config.block_p + width)
    return tile * config.num_stages * torch.empty(0, dtype=problem.dtype).element_size()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rule_fits_shared_memory_and_the_padding_everywhere(capability, dtype):
    limit = {8: 99, 9: 227, 10: 227}[capability[0]] * 1024  # 99 KiB: sm86 and sm89; sm80 has 163
    for kernel in KERNELS:
        for rows in (1, 17, 100, 500, 1024, 100_000):
            problem = Problem(kernel, rows * 8, 8, 2048, 768, dtype, capability)
            config = tuning.rule(problem)
            assert _shared_bytes(problem, config) <= limit, (problem, config)
            assert tuning.candidates(problem)[0] == config
            for candidate in tuning.candidates(problem):
                if kernel.endswith("_weight_grad"):
                    assert 64 % candidate.block_p == 0  # launch.PAD


def test_the_shipped_table_is_readable_and_keyed_as_looked_up():
    keys = tuning._shipped()
    qwen3 = [Problem(k, 16384 * 8, 128, 2048, 768, torch.bfloat16, (9, 0)).key for k in KERNELS]
    assert set(qwen3) <= set(keys)


@pytest.mark.parametrize("kernel", ["down_backward", "down_weight_grad", "up_weight_grad"])
def test_narrow_experts_gather_in_the_backward_and_wide_ones_copy(kernel):
    """Of candidates that are measured against each other either all need the copy of rows or none, for the copy is not
    measured."""
    problem = Problem(kernel, 131072, 128, 2048, 768, torch.bfloat16, (9, 0), gluon=True)
    assert all(c.gluon and c.gather for c in tuning.candidates(problem))
    wide = tuning.candidates(problem._replace(intermediate=1024))
    assert any(c.gluon for c in wide) and not any(c.gluon and c.gather for c in wide)
    for few in (problem._replace(rows=4096), problem._replace(gluon=False)):
        assert not any(c.gluon for c in tuning.candidates(few))


def test_the_shipped_configurations_of_a_layer_gather_together():
    """The copy of dout serves the down-projection's backward and its weight gradient: one alone would not save it."""
    shipped = {key: config for key, config in tuning._shipped().items() if key.endswith("gluon")}
    for key, config in shipped.items():
        if " down_backward " in key:
            other = shipped[key.replace("down_backward", "down_weight_grad")]
            assert config.gather == (other.gluon and other.gather), key
