"""consolidate of what training changed in the model: everything trained is in the result, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from accel_moe.checkpoint import export_plan
from tests.exports import (
    assert_same_tensors,
    make_trained,
    one_line_error,
    read_weights,
    run,
    write_checkpoint,
    write_manifest_of,
)
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write_base(tmp_path, family="qwen3_moe", **options):
    tiny_model(family, seed=0, **options).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    return tmp_path / "base"


def assert_same_model(loaded, trained):
    assert_same_tensors(dict(loaded.state_dict()), dict(trained.state_dict()))
    with torch.no_grad():
        theirs, ours = (m.eval()(torch.arange(12).view(2, 6)).logits for m in (loaded, trained))
    torch.testing.assert_close(theirs, ours)  # not bit by bit: the two run other kernels of transformers'


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


@pytest.mark.core
@pytest.mark.parametrize("options", [[], ["--max-shard-size", "30KB"], ["--workers", "2"]])
def test_a_head_that_was_untied_in_training_is_in_the_result_and_its_config_loads_it(tmp_path, options):
    base = write_base(tmp_path, tie=True)
    model = tiny_model("qwen3_moe", seed=5, tie=False)
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    assert run("--verify", *options, checkpoint, tmp_path / "out", base) == 0
    loaded, report = load(tmp_path / "out")
    assert not any(report.values()), report
    assert_same_model(loaded, model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_was_tied_in_training_is_written_where_the_base_has_one(tmp_path):
    base = write_base(tmp_path, tie=False)
    model = tiny_model("qwen3_moe", seed=5, tie=True)
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    assert run("--verify", checkpoint, tmp_path / "out", base) == 0
    assert_same_model(load(tmp_path / "out")[0], model)


def test_an_untied_head_takes_the_dtype_that_its_twin_has_in_the_base(tmp_path):
    base = write_base(tmp_path, tie=True)
    for file in base.glob("*.safetensors"):
        save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file, metadata={"format": "pt"})
    model = tiny_model("qwen3_moe", seed=5, tie=False)
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    assert run("--verify", checkpoint, tmp_path / "out", base) == 0
    assert torch.equal(read_weights(tmp_path / "out")["lm_head.weight"], model.lm_head.weight.bfloat16())


def test_the_embeddings_of_an_encoder_and_a_decoder_that_were_trained_apart_stay_apart(tmp_path):
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    def build(seed, tie):
        torch.manual_seed(seed)
        config = SwitchTransformersConfig(
            vocab_size=64, d_model=32, d_kv=8, d_ff=24, num_heads=4, num_layers=2, num_decoder_layers=2, num_experts=4,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, tie_word_embeddings=tie,
        )  # fmt: skip
        return SwitchTransformersForConditionalGeneration(config)

    build(0, True).save_pretrained(tmp_path / "base")
    model = build(5, False)
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    assert run("--verify", checkpoint, tmp_path / "out", tmp_path / "base") == 0
    loaded = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    trained = model.state_dict()
    assert not [name for name, tensor in trained.items() if not torch.equal(tensor, loaded[name])]


def test_embeddings_that_the_architecture_ties_anyway_are_refused_by_name(tmp_path, capsys, monkeypatch):
    base = write_base(tmp_path, tie=True)
    checkpoint = write_checkpoint(tiny_model("qwen3_moe", seed=5, tie=False), tmp_path / "checkpoint")
    real = export_plan.tied_names
    monkeypatch.setattr(
        export_plan, "tied_names", lambda model: real(model) | {"lm_head.weight": "model.embed_tokens.weight"}
    )
    line = one_line_error(capsys, checkpoint, tmp_path / "out", base)
    assert "lm_head.weight with other values than model.embed_tokens.weight" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.core
def test_verify_compares_with_all_that_the_checkpoint_has(tmp_path, capsys, monkeypatch):
    base = write_base(tmp_path, tie=True)
    checkpoint = write_checkpoint(tiny_model("qwen3_moe", seed=5, tie=False), tmp_path / "checkpoint")
    write_manifest_of(checkpoint)
    monkeypatch.setattr(export_plan, "_trained_apart", lambda reader, aliases: [])  # as it was
    assert run("--verify", checkpoint, tmp_path / "out", base) == 1
    assert "lm_head.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def classifier(seed):
    from transformers import Qwen3MoeForSequenceClassification

    from tests.tiny import tiny_config

    torch.manual_seed(seed)
    config = tiny_config("qwen3_moe")
    config.num_labels = 3
    config.pad_token_id = 0
    return Qwen3MoeForSequenceClassification(config)


def test_a_new_head_is_refused_by_name_with_the_base_that_will_do_and_that_does(tmp_path, capsys):
    base = write_base(tmp_path)
    model = classifier(5)
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    line = one_line_error(capsys, checkpoint, tmp_path / "out", base)
    assert "score.weight is in the checkpoint and not in the base" in line and "CHANGED as the base" in line
    classifier(0).save_pretrained(tmp_path / "changed")
    assert run("--verify", checkpoint, tmp_path / "out", tmp_path / "changed") == 0
    assert torch.equal(read_weights(tmp_path / "out")["score.weight"], model.score.weight)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is in the checkpoint and not in the base"),
        ({"num_hidden_layers": 1}, "model.layers.1.self_attn.q_proj.weight is in the base and not in the checkpoint"),
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias is in the checkpoint and not in the base"),
    ],
)
def test_layers_or_biases_that_the_base_lacks_or_has_more_of_are_named(tmp_path, capsys, change, named):
    base = write_base(tmp_path)
    checkpoint = write_checkpoint(tiny_model("qwen3_moe", seed=5, **change), tmp_path / "checkpoint")
    line = one_line_error(capsys, checkpoint, tmp_path / "out", base)
    assert named in line and "CHANGED as the base" in line


@pytest.mark.core
@pytest.mark.parametrize("tie", [False, True])
def test_resized_embeddings_name_the_base_that_will_do_and_that_does(tmp_path, capsys, tie):
    checkpoint, base, _ = make_trained(tmp_path, "qwen3_moe", tie=tie)
    model = tiny_model("qwen3_moe", seed=5, tie=tie)
    model.resize_token_embeddings(70)
    checkpoint = write_checkpoint(model, tmp_path / "resized checkpoint")
    line = one_line_error(capsys, checkpoint, tmp_path / "out", base)
    assert "resize_token_embeddings(70)" in line and "RESIZED as the base" in line
    resized = load(base)[0]
    resized.resize_token_embeddings(70)
    resized.save_pretrained(tmp_path / "resized base")
    assert run("--verify", checkpoint, tmp_path / "out", tmp_path / "resized base") == 0
    assert torch.equal(read_weights(tmp_path / "out")["model.embed_tokens.weight"], model.model.embed_tokens.weight)
