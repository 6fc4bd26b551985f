"""save_state and load_state: exact on any number of ranks, and whole weights wherever accelerate promises them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from accel_moe import consolidate
from accel_moe.checkpoint.manifest import MANIFEST_NAME, read_manifest
from tests.distributed.checkpoint_runs import (
    Snapshot,
    load_errors,
    load_runs,
    load_with_more_parameters,
    save_and_load_again,
    save_run,
    schedule_run,
    whole_weights,
    with_unused_parameter,
)
from tests.distributed.parity import Case, build
from tests.ranks import run_ranks

LAYOUTS = {
    "w4 ep4": Case(4, 4),
    "w4 ep2": Case(4, 2),
    "w2 ep2": Case(2, 2),
    "w2 ep1": Case(2, 1),
    "hsdp 2x2 ep2": Case(4, 2, dp_replicate=2),
    "w2 ep2 cp2": Case(2, 2, cp=2),
    "w4 ep4 cp2": Case(4, 4, cp=2),
    "one process": Case(1, 1),
    "w3 without us": Case(3, 1, ours=False),
}
LOAD_IN_SLOW_TESTS = {"hsdp 2x2 ep2", "w4 ep4 cp2", "w3 without us"}
"""What they save is loaded by the others all the same."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[str, Snapshot]]:
    """A checkpoint of every layout, and what the run that wrote it had and did."""
    root = tmp_path_factory.mktemp("layouts")
    made = {}
    for i, (name, case) in enumerate(LAYOUTS.items()):
        made[name] = (str(root / f"c{i}"), run_ranks(save_run, case.world, case, str(root / f"c{i}"))[0])
    return made


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name  # bit-exact: loading computes nothing


def without(tensors: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    """A gathered state dict repeats a tied weight, in accelerate alone as well: more than needed, and not wrong."""
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LOAD_IN_SLOW_TESTS)) for n in LAYOUTS]
)
def test_every_layout_loads_what_every_other_saved_bit_for_bit_and_trains_on_alike(saved, name):
    case = LAYOUTS[name]
    folders = [folder for folder, _ in saved.values()]
    for loaded, (_, written) in zip(run_ranks(load_runs, case.world, case, folders)[0], saved.values()):
        assert_same(loaded.weights, written.weights)
        assert_same(loaded.moments, written.moments)
        # the sums of gradients run in another order on another number of ranks
        assert loaded.losses == pytest.approx(written.losses, abs=1e-5)


def test_a_save_in_the_background_holds_the_step_it_was_asked_for(saved, tmp_path):
    case = LAYOUTS["w4 ep2"]
    written = run_ranks(partial(save_run, moe_async_save=True), 4, case, str(tmp_path / "c"), 3)[0]
    loaded = run_ranks(load_runs, 2, LAYOUTS["w2 ep2"], [str(tmp_path / "c")])[0][0]
    assert_same(loaded.weights, written.weights)
    assert_same(loaded.moments, written.moments)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.slow
def test_a_compiled_model_saves_what_any_other_loads(tmp_path):
    """torch.compile of a whole model puts `_orig_mod` into every name."""
    case = Case(2, 2, layers=1)
    written = run_ranks(save_run, 2, replace(case, compiled="whole"), str(tmp_path / "c"))[0]
    loaded = run_ranks(load_runs, 2, case, [str(tmp_path / "c")])[0][0]
    assert_same(loaded.weights, written.weights)
    assert_same(loaded.moments, written.moments)
    assert loaded.losses == pytest.approx(written.losses, abs=1e-5)


@pytest.mark.slow
def test_a_run_whose_weights_are_in_host_memory_saves_what_any_other_loads(tmp_path):
    offloaded = Case(2, 2, offload=True)
    written = run_ranks(save_run, 2, offloaded, str(tmp_path / "c"))[0]
    for case in (offloaded, Case(2, 2)):
        loaded = run_ranks(load_runs, 2, case, [str(tmp_path / "c")])[0][0]
        assert_same(loaded.weights, written.weights)
        assert_same(loaded.moments, written.moments)
        assert loaded.losses == pytest.approx(written.losses, abs=1e-5)


def test_the_manifest_says_what_was_saved_and_how(saved):
    folder, written = saved["hsdp 2x2 ep2"]
    manifest = read_manifest(folder)
    assert (manifest.dp_replicate, manifest.efsdp, manifest.ep, manifest.world_size) == (2, 1, 2, 4)
    assert manifest.step == 2 and manifest.model_type == "qwen3_moe"
    assert set(manifest.versions) == {"accel_moe", "torch", "accelerate", "transformers"}
    tensors = manifest.tensors["pytorch_model_fsdp_0"]
    assert {n.removeprefix("model."): e.shape for n, e in tensors.items() if "lm_head" not in n} == {
        n: tuple(t.shape) for n, t in written.weights.items() if "lm_head" not in n
    }
    assert "random_states_3.pkl" in manifest.own_files() and "optimizer_0/.metadata" in manifest.own_files()


def test_another_world_size_says_what_could_not_be_restored(saved):
    told = [text for snap in run_ranks(load_runs, 2, LAYOUTS["w2 ep2"], [saved["w4 ep4"][0]])[0] for text in snap.told]
    assert any("saved by 4 ranks and is loaded by 2" in text and "dataloader" in text for text in told)


def test_the_schedule_goes_on_after_the_same_number_of_batches_whatever_the_world_size(tmp_path):
    """accelerate steps it once per process: 2 steps of 4 ranks are 8 batches seen, and one step of 2 makes 10."""
    folder = str(tmp_path / "c")
    before = run_ranks(schedule_run, 4, LAYOUTS["w4 ep2"], folder, False)[0]
    assert before == pytest.approx([1 / 5, 1 / 9])
    assert run_ranks(schedule_run, 2, LAYOUTS["w2 ep2"], folder, True)[0] == pytest.approx([1 / 11])


def test_a_stock_checkpoint_is_loaded_with_a_warning(saved):
    told = run_ranks(load_runs, 2, LAYOUTS["w2 ep2"], [saved["w3 without us"][0]])[0][0].told
    assert any("no manifest" in text and "nothing vouches" in text for text in told)


def test_inspect_tells_the_layout_and_the_step_from_the_manifest(saved, capsys):
    assert consolidate.main(["--inspect", saved["hsdp 2x2 ep2"][0]]) == 0
    told = capsys.readouterr().out
    assert "step         2" in told and "world size 4: dp_replicate 2, efsdp 1, ep 2" in told
    assert "checksums blake2b" in told
    assert "committed; files present with the right sizes" in told


@pytest.mark.parametrize("name", ["w4 ep4", "hsdp 2x2 ep2", "w2 ep2 cp2"])
def test_consolidate_gives_the_trained_weights(saved, tmp_path, name):
    folder, written = saved[name]
    model = build(LAYOUTS[name])
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(written.weights[parameter_name])
    model.save_pretrained(tmp_path / "expected")
    assert consolidate.main(["--verify", folder, str(tmp_path / "out"), str(tmp_path / "base")]) == 0
    assert_same(
        load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "expected" / "model.safetensors")
    )


@pytest.mark.parametrize(
    "case",
    [Case(2, 2), pytest.param(Case(4, 2, num_experts=6), marks=pytest.mark.slow), Case(4, 2, dp_replicate=2, tie=True)],
    ids=lambda case: getattr(case, "name", None),
)
def test_whole_weights_are_right_wherever_accelerate_gives_them(tmp_path, case):
    got = run_ranks(whole_weights, case.world, case, str(tmp_path))[0]
    want = got["taken"].weights
    tied = {"lm_head.weight"} if case.tie else set()
    assert_same(without(got["state_dict"], tied), want)
    assert_same(got["loaded"].weights, want)
    assert_same(got["loaded"].moments, got["taken"].moments)
    assert_same(without(load_file(tmp_path / "save_model" / "model.safetensors"), tied), want)
    reference = build(case)
    reference.load_state_dict(want, strict=False)
    reference.tie_weights()
    reference.save_pretrained(tmp_path / "expected")
    assert_same(
        without(load_file(tmp_path / "save_pretrained" / "model.safetensors"), tied),
        load_file(tmp_path / "expected" / "model.safetensors"),
    )
    config = json.loads((tmp_path / "save_pretrained" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]


@pytest.mark.parametrize(
    "given, found",
    [
        ("missing", "is not a folder"),
        ("base model", "expected pytorch_model_fsdp_0/"),
        ("another model", "a checkpoint of another model (qwen3_moe"),
        ("unfinished", "never committed"),
    ],
)
def test_a_wrong_folder_is_refused_on_every_rank_before_anything_is_loaded(saved, tmp_path, given, found):
    case, folder = Case(2, 2), tmp_path / "nothing"
    if given == "base model":
        (folder / "shards").mkdir(parents=True)
    elif given == "another model":
        case, folder = Case(2, 2, num_experts=4), saved["w2 ep2"][0]
    elif given == "unfinished":
        folder = tmp_path / "tmp-0-abcdefghijkl.c"
        folder.mkdir()
    for kind, text, untouched in run_ranks(load_errors, 2, case, str(folder)):
        assert kind in ("CheckpointError", "ValueError") and found in text and untouched


def test_a_manifest_that_was_lost_is_not_taken_for_a_stock_checkpoint(saved, tmp_path):
    import shutil

    shutil.copytree(saved["w2 ep2"][0], tmp_path / "c")
    (tmp_path / "c" / MANIFEST_NAME).unlink()
    for kind, text, untouched in run_ranks(load_errors, 2, Case(2, 2), str(tmp_path / "c")):
        assert kind == "CheckpointError" and "it is gone" in text and untouched


def threads_of_the_checkpoints_group() -> tuple[int, int, int]:
    import torch.distributed as dist

    from accel_moe import ranks

    dist.init_process_group("gloo")
    before = len(os.listdir("/proc/self/task"))
    assert ranks.gather(dist.get_rank()) == [0, 1]
    during = len(os.listdir("/proc/self/task"))
    ranks.close_group()
    return before, during, len(os.listdir("/proc/self/task"))


def test_the_end_of_the_process_waits_for_the_threads_of_the_checkpoints_group():
    """One that still drops its last tensors while the interpreter shuts down aborts the process."""
    for before, during, after in run_ranks(threads_of_the_checkpoints_group, 2):
        assert before < during and after == before


def test_a_parameter_that_no_forward_uses_resumes_without_optimizer_state(tmp_path):
    case, folder = Case(2, 2), str(tmp_path / "state")
    taken = run_ranks(with_unused_parameter, 2, save_run, case, folder)[0]
    (loaded,) = run_ranks(with_unused_parameter, 2, load_runs, case, [folder])[0]
    assert loaded.losses == taken.losses and loaded.moments.keys() == taken.moments.keys()
    assert not any("unused" in name for name in taken.moments) and "model.unused" in loaded.weights
    wanted, found = run_ranks(with_unused_parameter, 2, save_and_load_again, case, folder + "-again")[0]
    assert found == wanted


def test_an_optimizer_with_more_parameters_than_the_saved_one_is_refused_on_every_rank(tmp_path):
    for said in run_ranks(load_with_more_parameters, 2, Case(2, 2), str(tmp_path / "state")):
        assert said.startswith("CheckpointError") and "has no optimizer state of" in said and "norm" in said
