"""consolidate merges an adapter into its base: the result is PEFT's own merge, in the base's format."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dist_cp
from safetensors.torch import load_file, save_file

from accel_moe.checkpoint import merged
from accel_moe.weights import adapter as adapters
from accel_moe.weights.adapter import LowRankChange
from tests.adapters import EXPERTS, experts_parameters, merged_by_peft, wrap
from tests.exports import (
    assert_same_tensors,
    interrupt_writes,
    offer_on_hub,
    one_line_error,
    read_weights,
    run,
    write_checkpoint,
    write_manifest_of,
)
from tests.tiny import tiny_model
from tests.unit.test_hub_format import FAMILIES, family

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def save(tmp_path, model, **options):
    """(adapter, base): the folders of a random adapter and of its base."""
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    wrap(model, **options).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", tmp_path / "base"


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path, tiny_model("qwen3_moe"), target_modules=["q_proj"], target_parameters=list(EXPERTS))


def merge_rows():
    """Every style of keys in fp32. Rounding knows no keys: one family shows it, and the others' bf16 is slow."""
    for name in FAMILIES:
        yield pytest.param(name, torch.float32, id=f"{name}-fp32")
        yield pytest.param(name, torch.bfloat16, marks=() if name == "mixtral" else pytest.mark.slow, id=f"{name}-bf16")


@pytest.mark.core
@pytest.mark.parametrize(("model_type", "dtype"), list(merge_rows()))
def test_the_merged_model_is_the_one_that_peft_merges_in_the_format_of_the_base(tmp_path, model_type, dtype):
    model = family(model_type).to(dtype)
    experts = experts_parameters(model)
    adapter, base = save(tmp_path, model, target_modules=["q_proj", "v_proj", "o_proj"], target_parameters=experts)
    expected = merged_by_peft(base, adapter, tmp_path / "expected")
    assert run("--verify", adapter, tmp_path / "out", base) == 0
    got, before = read_weights(tmp_path / "out"), read_weights(base)
    # float32 bit for bit. Of bf16 the sum is computed in float32 and rounded once: PEFT, asked for bf16, rounds the
    # change as well, and is further from the truth
    assert_same_tensors(got, {key: tensor.to(before[key].dtype) for key, tensor in expected.items()})
    assert any("expert" in key or "_linear" in key for key in got if not torch.equal(got[key], before[key]))
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj"], target_parameters=list(EXPERTS), use_rslora=True),
        dict(target_modules=[], target_parameters=[EXPERTS[1]]),
        dict(target_modules=[], target_parameters=[EXPERTS[0], "mlp.gate.weight"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
        dict(target_modules=["embed_tokens", "lm_head"]),
        dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
        dict(target_modules="all-linear"),
        dict(
            target_modules=["q_proj", "k_proj"],
            target_parameters=list(EXPERTS),
            rank_pattern={"k_proj": 2, "experts.down_proj": 3, r"layers\.1\..*gate_up_proj": 5},
            alpha_pattern={"layers.0.self_attn.q_proj": 40, "experts.gate_up_proj": 7},
        ),
    ],
    ids=["rslora", "one parameter", "router", "trained whole", "embeddings", "one layer", "all linear", "patterns"],
)
def test_what_else_lora_configs_say_is_merged_as_peft_does(tmp_path, options):
    adapter, base = save(tmp_path, tiny_model("qwen3_moe"), **options)
    expected = merged_by_peft(base, adapter, tmp_path / "expected")
    assert run("--verify", adapter, tmp_path / "out", base) == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_biases_that_were_trained_beside_the_adapter_replace_those_of_the_base(tmp_path):
    model = family("gpt_oss")
    model.save_pretrained(tmp_path / "base")
    wrapped = wrap(model, target_modules=["q_proj"], bias="lora_only")
    trained = [p for n, p in wrapped.named_parameters() if n.endswith(".bias") and p.requires_grad]
    with torch.no_grad():
        for bias in trained:
            bias += 1
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = merged_by_peft(tmp_path / "base", tmp_path / "adapter", tmp_path / "expected")
    assert trained and run(tmp_path / "adapter", tmp_path / "out", tmp_path / "base") == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_a_change_of_one_of_two_tied_weights_unties_them_in_the_result(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter, base = save(tmp_path, tiny_model("qwen3_moe", tie=True), target_modules=["lm_head"])
    assert run("--verify", adapter, tmp_path / "out", base) == 0
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        right = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    # a merged weight is rounded once more than two products that are added: fp32 noise
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-5 * right.abs().max().item())
    assert not torch.allclose(plain, right, atol=1e-2)


def test_an_adapter_that_names_single_experts_is_merged_as_peft_merges_it(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for key, tensor in read_weights(tmp_path / "base").items():
        if ".experts." in key:
            out, inner = tensor.shape
            for factor, shape in (("A", (4, inner)), ("B", (out, 4))):
                name = f"base_model.model.{key.removesuffix('weight')}lora_{factor}.weight"
                tensors[name] = torch.randn(shape, generator=generator) * 0.3
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["w1", "w2", "w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    expected = merged_by_peft(tmp_path / "base", folder, tmp_path / "expected")
    assert run("--verify", folder, tmp_path / "out", tmp_path / "base") == 0
    got = read_weights(tmp_path / "out")
    assert set(got) == set(expected) and len(tensors) == 2 * 3 * 8 * 2
    for key, tensor in expected.items():  # PEFT adds zeros of the other half of gate_up_proj: another order of sums
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.core
@pytest.mark.parametrize("with_manifest", [True, False])
def test_the_checkpoint_of_an_adapter_run_is_merged(tmp_path, with_manifest):
    """A checkpoint that has base and adapter, under the names of the live PEFT model."""
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    wrapped = wrap(model, target_modules=["q_proj"], target_parameters=list(EXPERTS), modules_to_save=["lm_head"])
    checkpoint = write_checkpoint(wrapped, tmp_path / "checkpoint")
    wrapped.peft_config["default"].save_pretrained(checkpoint)
    if with_manifest:
        write_manifest_of(checkpoint)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = merged_by_peft(tmp_path / "base", tmp_path / "adapter", tmp_path / "expected")
    assert run("--verify", checkpoint, tmp_path / "out", tmp_path / "base") == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_buffers_that_changed_in_an_adapter_run_are_in_its_checkpoint_and_in_the_merged_model(tmp_path):
    from accel_moe.checkpoint.adapter_run import without_base

    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path / "base")
    wrapped = wrap(model, target_modules=["o_proj"], target_parameters=[*EXPERTS, "mlp.gate.weight"])
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    wrapped.get_submodule("base_model.model.model.layers.1.mlp.gate.base_layer").e_score_correction_bias += 1
    kept = without_base(wrapped, wrapped.state_dict())
    assert [n for n in kept if ".lora_" not in n] == [f"base_model.model.{name.replace('.e_', '.base_layer.e_')}"]
    writer = dist_cp.FileSystemWriter(tmp_path / "checkpoint" / "pytorch_model_fsdp_0")
    dist_cp.save({"model": kept}, storage_writer=writer, no_dist=True)
    wrapped.peft_config["default"].save_pretrained(tmp_path / "checkpoint")
    assert run("--verify", tmp_path / "checkpoint", tmp_path / "out", tmp_path / "base") == 0
    got = read_weights(tmp_path / "out")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "expected")
    assert_same_tensors(got, read_weights(tmp_path / "expected"))
    assert not torch.equal(got[name], read_weights(tmp_path / "base")[name])


def test_the_checkpoint_of_an_adapter_run_without_its_config_says_what_is_missing(tmp_path, saved, capsys):
    wrapped = wrap(tiny_model("qwen3_moe"), target_modules=["q_proj"])
    checkpoint = write_checkpoint(wrapped, tmp_path / "checkpoint")
    line = one_line_error(capsys, checkpoint, tmp_path / "out", saved[1])
    assert "no adapter_config.json" in line and "save_pretrained(FOLDER)" in line
    assert not list(tmp_path.glob("out*"))


def test_a_base_on_the_hub_is_fetched_file_by_file(tmp_path, saved, monkeypatch):
    from accel_moe.weights.safetensors import safetensors_files

    adapter, base = saved
    expected = merged_by_peft(base, adapter, tmp_path / "expected")
    fetched = offer_on_hub(base, tmp_path / "cache", monkeypatch)
    assert run(adapter, tmp_path / "out", "some/model") == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)
    assert sorted(fetched) == safetensors_files(base)  # each once


def test_two_workers_layout_dtype_and_an_interruption_are_as_for_full_checkpoints(tmp_path, saved, monkeypatch):
    adapter, base = saved
    expected = merged_by_peft(base, adapter, tmp_path / "expected")
    stopped = [5]
    calls = interrupt_writes(monkeypatch, lambda index, calls: len(calls) in stopped)
    assert run(adapter, tmp_path / "out", base) == 130 and not (tmp_path / "out").exists()
    stopped.clear()
    assert run("--verify", adapter, tmp_path / "out", base) == 0
    assert len(calls) == len(set(calls))  # nothing twice
    assert_same_tensors(read_weights(tmp_path / "out"), expected)
    assert run("--workers", "2", "--dtype", "bfloat16", "--max-shard-size", "60KB", adapter, tmp_path / "2", base) == 0
    assert_same_tensors(read_weights(tmp_path / "2"), {k: t.bfloat16() for k, t in expected.items()})


def test_an_interrupted_merge_starts_over_when_the_base_or_the_adapter_changed(tmp_path, saved, monkeypatch):
    adapter, base = saved
    calls = interrupt_writes(monkeypatch, lambda index, _: index == 9)
    for changed in (sorted(base.glob("*.safetensors"))[0], adapter / "adapter_model.safetensors", None, None):
        calls.clear()
        assert run(adapter, tmp_path / "out", base) == 130
        if changed is not None:
            assert calls == list(range(9))
            os.utime(changed, ns=(1, changed.stat().st_mtime_ns + 1))
    assert calls == []  # nothing changed before the last run


@pytest.mark.slow
def test_the_memory_of_a_merge_is_that_of_its_largest_group_whatever_the_size_of_the_base(tmp_path):
    """Bases of 2 and 4 GB in bf16; the largest group is 134 MB."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    peaks = []
    for layers in (10, 20):
        folder = tmp_path / str(layers)
        config = Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=1024,
            moe_intermediate_size=512,
            num_experts=64,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / "base")
        wrap(model, target_modules=["q_proj"], target_parameters=list(EXPERTS)).save_pretrained(folder / "adapter")
        del model
        code = (
            "from accel_moe import consolidate\n"
            f"assert consolidate.main({[str(folder / name) for name in ('adapter', 'out', 'base')]}) == 0\n"
            # ru_maxrss would count the process that started this one
            "print('peak', next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        peaks.append(1024 * int(done.stdout.split("peak")[1]))
        shutil.rmtree(folder)
    print(f"peak memory of the process: {peaks[0] / 1e9:.2f} GB, {peaks[1] / 1e9:.2f} GB")
    # the stored group, its float32 twice (loaded, converted), a part of the change, and the interpreter with torch
    assert max(peaks) < 134e6 * (1 + 2 + 2) + 3 * adapters._CHUNK_BYTES + 0.7e9
    assert peaks[1] - peaks[0] < 134e6


# --- negative controls: the tests above would see these


@pytest.mark.parametrize("mistake", ["no scale", "another expert's A", "parameters swapped", "rank before expert"])
def test_a_mistake_in_the_change_is_seen(tmp_path, saved, monkeypatch, mistake):
    adapter, base = saved
    expected = merged_by_peft(base, adapter, tmp_path / "expected")
    real = LowRankChange.add_to

    def wrong(self, weight, a, b):
        if self.experts and mistake == "another expert's A":
            a = a.reshape(self.experts, -1, a.shape[-1]).roll(1, 0).reshape(a.shape)
        if self.experts and mistake == "rank before expert":
            b = b.reshape(len(b), self.experts, -1).transpose(1, 2).reshape(b.shape)
        if mistake == "no scale":
            self = LowRankChange(self.a, self.b, 1.0, self.experts, self.transposed)
        real(self, weight, a, b)

    if mistake == "parameters swapped":
        own = adapters._Planner._target_parameters
        monkeypatch.setattr(adapters._Planner, "_target_parameters", lambda self, path: own(self, path)[::-1])
        assert run(adapter, tmp_path / "out", base) == 1
        return
    monkeypatch.setattr(LowRankChange, "add_to", wrong)
    assert run(adapter, tmp_path / "out", base) == 0
    got = read_weights(tmp_path / "out")
    assert not torch.equal(got[key := "model.layers.1.mlp.experts.3.up_proj.weight"], expected[key])


def test_the_change_in_parts_is_the_change_in_one(monkeypatch):
    torch.manual_seed(0)
    a, b = torch.randn(8 * 4, 16), torch.randn(24, 4 * 8)
    whole, parts = torch.zeros(8, 24, 16), torch.zeros(8, 24, 16)
    change = LowRankChange("a", "b", 0.5, experts=8)
    change.add_to(whole, a, b)
    monkeypatch.setattr(adapters, "_CHUNK_BYTES", 3 * 24 * 16 * 4)
    change.add_to(parts, a, b)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    one = torch.einsum("or,ri->oi", b.reshape(24, 4, 8)[..., 5], a.reshape(8, 4, 16)[5]) * 0.5
    torch.testing.assert_close(whole[5], one, rtol=0, atol=1e-6)  # another kernel's order of sums
    rows, wide = torch.zeros(24, 16), LowRankChange("a", "b", 0.5)
    monkeypatch.setattr(adapters, "_CHUNK_BYTES", 5 * 16 * 4)
    wide.add_to(rows, a[:4], b[:, :4])
    torch.testing.assert_close(rows, b[:, :4] @ a[:4] * 0.5, rtol=0, atol=1e-6)


# --- what cannot be merged


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"use_dora": True}, "use_dora: True, expected plain LoRA"),
        ({"peft_type": "LOHA"}, "is of type LOHA, expected LORA"),
        ({"peft_type": None}, "is of type None, expected LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base's weights"),
        ({"lora_alpha": "much"}, "not a LoRA config as PEFT writes it"),
        ({"r": 8}, "experts.lora_A.weight has shape (32, 24), expected (64, 24)"),
        ({"target_parameters": [EXPERTS[0]]}, "has 2 pairs of lora_A and lora_B"),
        ({"target_parameters": []}, "has no weight that target_modules or target_parameters means"),
        ({"trainable_token_indices": [1]}, "expected plain LoRA"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused_with_the_way_to_merge_it(tmp_path, saved, capsys, fields, told):
    adapter, base = saved
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    line = one_line_error(capsys, adapter, tmp_path / "out", base)
    assert told in line and ("PEFT" in line or "peft" in line)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("drop", "has no other half"),
        ("nan", "q_proj.lora_A.weight of"),
        ("magnitude", "lora_magnitude_vector is no lora_A, lora_B or whole weight"),
        ("stranger", "model.layers.9.self_attn.q_proj, which the base does not have"),
        ("weight", "model.norm2.weight is a weight that the base does not have"),
        ("empty", "of the adapter's weights nothing: expected adapter_model.safetensors"),
        ("cut", "is truncated"),
    ],
)
def test_a_damaged_adapter_is_refused_by_name(tmp_path, saved, capsys, change, told):
    adapter, base = saved
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if change == "drop":
        del tensors[key]
    elif change == "nan":
        tensors[key][0, 0] = float("nan")
    elif change == "magnitude":
        tensors[key.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(32)
    elif change == "stranger":
        for name in [name for name in tensors if "layers.0.self_attn.q_proj" in name]:
            tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)
    elif change == "weight":
        tensors["base_model.model.model.norm2.weight"] = torch.ones(32)
    path.unlink()
    if change != "empty":
        save_file(tensors, path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    line = one_line_error(capsys, adapter, tmp_path / "out", base)
    assert told in line and (change != "nan" or "has NaN or infinity" in line)
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_of_another_base_is_refused_by_shapes_and_its_own_base_is_named(tmp_path, saved, capsys):
    adapter, _ = saved
    tiny_model("qwen3_moe", num_experts=4).save_pretrained(tmp_path / "other")
    line = one_line_error(capsys, adapter, tmp_path / "out", tmp_path / "other")
    assert "is not an adapter of" in line and "has shape (32, 24), expected (16, 24)" in line
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/base"}))
    one_line_error(capsys, adapter, tmp_path / "out", tmp_path / "other")
    assert run(adapter, tmp_path / "out", saved[1]) == 0
    assert "its base is org/base" in capsys.readouterr().err


def test_a_quantised_base_is_refused(tmp_path, saved, capsys):
    adapter, base = saved
    config = json.loads((base / "config.json").read_text())
    for method in ("mxfp4", "fp8", "gptq", "awq"):
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
        line = one_line_error(capsys, adapter, tmp_path / "out", base)
        assert f"is quantised ({method})" in line and "dequantised copy" in line
    assert not list(tmp_path.glob("out*"))


def test_several_adapters_in_one_checkpoint_are_refused_and_one_can_be_meant():
    names = ["base_model.model.q.lora_A.first.weight", "base_model.model.q.lora_A.second.weight"]
    with pytest.raises(merged.CheckpointError, match="found the adapters first, second, expected one"):
        adapters.plain_names(names)
    assert adapters.plain_names(names, "second") == {"base_model.model.q.lora_A.weight": names[1]}


def test_merging_needs_no_peft(tmp_path, saved):
    adapter, base = saved
    code = (
        "import sys; sys.modules['peft'] = None\nfrom accel_moe import consolidate\n"
        f"sys.exit(consolidate.main(['--verify', {str(adapter)!r}, {str(tmp_path / 'out')!r}, {str(base)!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert_same_tensors(read_weights(tmp_path / "out"), merged_by_peft(base, adapter, tmp_path / "expected"))
