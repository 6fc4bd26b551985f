"""What is no model is refused by what it is, not by what transformers makes of it."""

import json

import pytest
import torch

import accel_moe
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("many_ranks")
MODEL = r"expects a model: config\.json and \*\.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return folder


def with_config(folder, base, configured=True):
    folder.mkdir(parents=True, exist_ok=True)
    if configured:
        (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def sharded(folder):
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": {"weight": torch.ones(2)}}, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_an_adapter_is_refused_with_its_base_and_what_to_do(beside_a_model, base, tmp_path):
    peft = pytest.importorskip("peft")
    if beside_a_model:
        tiny_model().save_pretrained(tmp_path)
    model = tiny_model()
    model.config._name_or_path = model.name_or_path = str(base)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"{tmp_path} is a PEFT adapter .* of {base}\. .*{MODEL}.*PeftModel.*accel_moe\.prepare\(model\)",
    ):
        accel_moe.from_pretrained(tmp_path)


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("inside", ["", "pytorch_model_fsdp_0"])
def test_a_training_checkpoint_is_refused_with_both_ways_to_go_on(inside, configured, base, tmp_path):
    with_config(tmp_path, base, configured)
    sharded(tmp_path / inside)
    with pytest.raises(ValueError, match=rf"is a sharded training checkpoint.*{MODEL}.*load_state.*accel_moe\.consoli"):
        accel_moe.from_pretrained(tmp_path)


def test_a_full_checkpoint_of_accelerate_is_refused_with_what_loads_it(base, tmp_path):
    torch.save({}, with_config(tmp_path, base) / "pytorch_model_fsdp.bin")
    with pytest.raises(ValueError, match=rf"is a training checkpoint of accelerate.*{MODEL}.*load_state"):
        accel_moe.from_pretrained(tmp_path)


def test_the_folder_of_a_run_is_refused_with_its_checkpoints(base, tmp_path):
    for step in (5, 10):
        sharded(tmp_path / f"checkpoint-{step}" / "pytorch_model_fsdp_0")
    with pytest.raises(
        ValueError, match=rf"is the folder of a run, with checkpoint-5, checkpoint-10.*{MODEL}.*consoli"
    ):
        accel_moe.from_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match=rf"is the folder of a run.*{MODEL}. Give the model in it .*: checkpoint-10"):
        accel_moe.from_pretrained(tmp_path)


@pytest.mark.parametrize("configured", [False, True])
def test_gguf_weights_are_refused_as_such(configured, base, tmp_path):
    (with_config(tmp_path, base, configured) / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=rf"holds GGUF weights \(model-q4\.gguf\).*{MODEL}.*gguf_file="):
        accel_moe.from_pretrained(tmp_path)


@pytest.mark.parametrize("configured", [False, True])
def test_pickled_weights_are_refused_as_such(configured, base, tmp_path):
    torch.save({}, with_config(tmp_path, base, configured) / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"has pytorch_model\.bin.*reads safetensors only.*save_pretrained\(\) it once"
    ):
        accel_moe.from_pretrained(tmp_path)


def test_what_is_missing_is_said_with_what_is_there(base, tmp_path):
    with pytest.raises(ValueError, match=rf"has no config\.json; it holds nothing.*{MODEL}"):
        accel_moe.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"has a config\.json and no weights; it holds config\.json.*{MODEL}"):
        accel_moe.from_pretrained(with_config(tmp_path / "c", base))
    with pytest.raises(ValueError, match=rf"is a file.*{MODEL}. Give its folder, {base}"):
        accel_moe.from_pretrained(base / "model.safetensors")
    with pytest.raises(OSError, match=rf"does not exist.*{MODEL}"):
        accel_moe.from_pretrained(tmp_path / "nothing_here")
    with pytest.raises(OSError, match=rf"a/path/nowhere does not exist.*{MODEL}"):
        accel_moe.from_pretrained("a/path/nowhere")


def test_a_model_that_the_hub_does_not_give_is_named_with_what_to_give(monkeypatch):
    for ranks in ("2", "1"):  # weights that wait for their shards, and weights that are read at once
        monkeypatch.setenv("WORLD_SIZE", ranks)
        with pytest.raises(OSError, match=r"^nobody/nothing is no folder here, and .* the Hub: .*Give the model's"):
            accel_moe.from_pretrained("nobody/nothing")


def test_weights_without_a_config_are_taken_with_the_config_that_is_given(base, tmp_path):
    for name in ("model.safetensors", "generation_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    with pytest.raises(ValueError, match=r"has no config\.json; it holds .*model\.safetensors"):
        accel_moe.from_pretrained(tmp_path)
    config = type(tiny_model().config)(**json.loads((base / "config.json").read_text()))
    assert accel_moe.from_pretrained(tmp_path, config=config).lm_head.weight.is_meta
