"""Checkpoints of LoRA runs: the adapter and what else was trained, never the base; resumed, taken out, merged."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accel_moe.checkpoint.manifest import read_manifest
from tests.adapters import merged_by_peft
from tests.distributed.adapter_runs import load_errors, load_run, save_run, train_with_trainer
from tests.distributed.parity import Case
from tests.exports import assert_same_tensors, one_line_error, read_weights, run
from tests.ranks import run_ranks
from tests.tiny import tiny_model

pytest.importorskip("peft")
FOUR, TWO, NO_EP, ONE = Case(4, 2), Case(2, 2), Case(2, 1), Case(1, 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "base"
    tiny_model("qwen3_moe").save_pretrained(folder, max_shard_size="40KB")
    return str(folder)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """(folder, what the run had and did)."""
    folder = str(tmp_path_factory.mktemp("runs") / "checkpoint")
    return folder, run_ranks(save_run, 4, FOUR, base, folder)[0]


def assert_same(got, want) -> None:
    for mine, theirs in ((got.weights, want.weights), (got.moments, want.moments)):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(mine[name], tensor), name  # loading computes nothing
    # the sums of gradients run in another order on another number of ranks
    assert got.losses == pytest.approx(want.losses, abs=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(TWO, marks=pytest.mark.core),
        NO_EP,
        ONE,
        pytest.param(FOUR, marks=pytest.mark.slow),
        pytest.param(Case(4, 4), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.name,
)
def test_a_run_goes_on_bit_for_bit_on_another_ep_and_world_size(base, saved, case):
    folder, written = saved
    assert_same(run_ranks(load_run, case.world, case, base, folder)[0], written)


def test_the_checkpoint_holds_the_adapter_its_optimizer_and_nothing_of_the_base(base, saved):
    folder, written = saved
    manifest = read_manifest(folder)
    stored = {n.removeprefix("model.") for n in manifest.tensors["pytorch_model_fsdp_0"]}
    assert stored == set(written.weights) and all(".lora_" in name for name in stored)
    states = manifest.tensors["optimizer_0"]
    assert states and all(".lora_" in name for name in states)
    entry = manifest.adapter
    assert entry.name == "default" and entry.config["r"] == 4 and entry.config["base_model_name_or_path"] == base
    assert set(entry.base_tensors) == set(read_weights(Path(base)))


@pytest.mark.slow
def test_frozen_parameters_that_the_optimizer_was_given_change_nothing(base, tmp_path):
    case, folder = TWO, str(tmp_path / "c")
    written = run_ranks(partial(save_run, everything=True), 2, case, base, folder)[0]
    assert all(".lora_" in n for n in read_manifest(folder).tensors["optimizer_0"])
    assert_same(run_ranks(partial(load_run, everything=True), 2, NO_EP, base, folder)[0], written)


def test_what_trains_beside_the_adapter_is_saved_with_it(base, tmp_path):
    folder = str(tmp_path / "c")
    options = dict(modules_to_save=["lm_head"], target_modules=["q_proj"], target_parameters=None)
    written = run_ranks(partial(save_run, **options), 2, TWO, base, folder)[0]
    assert "base_model.model.lm_head.modules_to_save.default.weight" in written.weights
    assert_same(run_ranks(partial(load_run, **options), 2, NO_EP, base, folder)[0], written)
    assert run("--adapter", folder, tmp_path / "adapter") == 0
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = merged_by_peft(base, tmp_path / "adapter", tmp_path / "expected")
    assert run("--verify", folder, tmp_path / "out", base) == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_full_state_dicts_leave_the_base_out_too(base, tmp_path, capsys):
    folder = str(tmp_path / "c")
    written = run_ranks(save_run, 2, TWO, base, folder, "full")[0]
    stored = torch.load(Path(folder) / "pytorch_model_fsdp.bin", weights_only=True)
    assert set(stored) == set(written.weights)
    assert_same(run_ranks(load_run, 2, NO_EP, base, folder, "full")[0], written)
    assert "as FULL_STATE_DICT saves it" in one_line_error(capsys, folder, tmp_path / "out", base)


@pytest.mark.parametrize("kind", ["with base", pytest.param("peft", marks=pytest.mark.slow)])
def test_checkpoints_of_before_and_of_accelerate_itself_load(base, tmp_path, kind):
    folder = str(tmp_path / "c")
    written = run_ranks(save_run, 2, TWO, base, folder, kind)[0]
    assert_same(run_ranks(load_run, 2, NO_EP, base, folder, kind)[0], written)


def test_the_adapter_comes_out_in_the_form_that_stock_peft_loads(base, saved, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, written = saved
    assert run("--adapter", folder, tmp_path / "adapter") == 0
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    found = {n: p for n, p in loaded.named_parameters() if ".lora_" in n}
    assert_same_tensors(found, written.weights)
    assert loaded.peft_config["default"].lora_alpha == 12


@pytest.mark.core
def test_the_checkpoint_is_merged_into_its_base(base, saved, tmp_path):
    folder, _ = saved
    assert run("--adapter", folder, tmp_path / "adapter") == 0
    expected = merged_by_peft(base, tmp_path / "adapter", tmp_path / "expected")
    assert run("--verify", "--workers", "2", folder, tmp_path / "out", base) == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def changed_copy(base: str, folder, key: str) -> str:
    """A base that differs in one value of one tensor."""
    import shutil

    shutil.copytree(base, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            tensors[key].view(-1)[-1] += 1
            save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


def test_another_base_is_refused_by_its_first_tensor_on_every_rank_and_in_a_merge(base, saved, tmp_path, capsys):
    folder, _ = saved
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    other = changed_copy(base, tmp_path / "other", key)
    for ((text, untouched),) in run_ranks(load_errors, 2, TWO, other, folder, [{}]):
        assert f"another base than {other}: {key} has the hash" in text and untouched
    line = one_line_error(capsys, folder, tmp_path / "out", other)
    assert f"{key} has the hash" in line and "expected" in line
    assert not list(tmp_path.glob("out*"))


def test_other_adapters_are_refused_by_name(base, saved):
    others = [{"r": 8}, {"target_modules": ["q_proj", "k_proj"]}, {"target_modules": ["q_proj"]}]
    for rank, k_proj, q_proj in run_ranks(load_errors, 2, TWO, base, saved[0], others):
        assert all("checkpoint of another adapter" in text and untouched for text, untouched in (rank, k_proj, q_proj))
        assert "q_proj.lora_A.default.weight has shape (4, 32) there, (8, 32) here" in rank[0]
        assert "k_proj.lora_A.default.weight is not in it" in k_proj[0]
        assert "v_proj.lora_A.default.weight is only there" in q_proj[0]


def test_inspect_tells_the_adapter(saved, capsys):
    assert run("--inspect", saved[0]) == 0
    assert "default: LORA, r 4; the base is not in the checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("args", [["--workers", "2"], ["--dtype", "float16"], ["--verify"], ["--keep-extra"]])
def test_options_of_a_whole_model_are_refused_beside_adapter(saved, tmp_path, capsys, args):
    with pytest.raises(SystemExit) as stopped:
        run("--adapter", *args, saved[0], tmp_path / "out")
    assert stopped.value.code == 2 and args[0] in capsys.readouterr().err


def test_a_checkpoint_without_an_adapter_says_so(base, tmp_path, capsys):
    from tests.exports import write_checkpoint

    checkpoint = write_checkpoint(tiny_model("qwen3_moe"), tmp_path / "whole")
    assert "holds no adapter" in one_line_error(capsys, "--adapter", checkpoint, tmp_path / "out")


def test_trainer_saves_the_adapter_alone_and_resumes_bit_for_bit(base, tmp_path):
    written = run_ranks(train_with_trainer, 2, TWO, base, str(tmp_path))[0]
    folder = tmp_path / "checkpoint-2"
    manifest = read_manifest(folder)
    assert manifest.adapter is not None and manifest.step == 2
    assert all(".lora_" in name for name in manifest.tensors["pytorch_model_fsdp_0"])
    again = run_ranks(train_with_trainer, 2, TWO, base, str(tmp_path / "again"), str(folder))[0]
    for name, tensor in written.weights.items():
        assert torch.equal(again.weights[name], tensor), name
    assert run("--adapter", tmp_path / "checkpoint-3", tmp_path / "last") == 0
    last, user = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("last", "saved"))
    assert_same_tensors(user, last)  # trainer.save_model, which gathers the adapter alone
    assert run("--adapter", folder, tmp_path / "adapter") == 0
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
