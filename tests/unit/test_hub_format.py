"""The Hub format: headers are the authority, groups convert one at a time, and both ways are exact."""

from __future__ import annotations

import hashlib
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from accel_moe.errors import HubFormatError
from accel_moe.weights import safetensors
from accel_moe.weights.hub_config import meta_model
from accel_moe.weights.safetensors import (
    HubTensor,
    header_bytes,
    parse_size,
    read_header,
    read_hub_tensors,
    read_range,
    safetensors_files,
    shard_names,
)
from accel_moe.weights.transforms import HubConverter
from tests.tiny import tiny_model

# Families whose keys, or whose way from keys to parameters, differ from each other; the sizes are as small as they go.
SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    top_k=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
FAMILIES = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "phimoe": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "ernie4_5_moe": "model.layers.1.mlp.experts.0.gate_proj.weight",
    "hunyuan_v1_moe": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "afmoe": "model.layers.2.mlp.experts.0.gate_proj.weight",
    "hy_v3": "model.layers.1.mlp.expert_bias",
    "granitemoe": "model.layers.0.block_sparse_moe.input_linear.weight",
    "nemotron_h": None,  # not gated: up_proj and down_proj alone
    "gpt_oss": "model.layers.0.mlp.experts.gate_up_proj_bias",
    "qwen3_next": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "deepseek_v2": "model.layers.1.mlp.experts.0.gate_proj.weight",
}


def family(model_type: str):
    """A small random model of a family, from its own default config with the sizes above."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type)
    names = set(vars(config)) | set(config.attribute_map)
    for name, value in SIZES.items():
        if name in names:
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[: SIZES["num_hidden_layers"]]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        key: hashlib.sha256(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for key, t in tensors.items()
    }


def read(folder) -> dict[str, torch.Tensor]:
    weights = {}
    for file in safetensors_files(folder):
        weights |= load_file(folder / file)
    return weights


@pytest.mark.core
@pytest.mark.parametrize("model_type", FAMILIES)
def test_group_by_group_gives_the_bytes_of_save_pretrained_and_loads_back(tmp_path, model_type):
    model = family(model_type)
    model.save_pretrained(tmp_path)
    expected = read(tmp_path)
    if FAMILIES[model_type] is not None:
        assert FAMILIES[model_type] in expected
    converter = HubConverter(meta_model(tmp_path), read_hub_tensors(tmp_path))
    state = model.state_dict()
    got = {}
    for group in converter.groups:
        hub = converter.convert(group, {name: state[name] for name in group.sources})
        got |= hub
        for name, tensor in converter.load(group, hub).items():
            assert torch.equal(tensor, state[name]), name
    assert digests(got) == digests(expected)
    assert not converter.base_only and not any(vars(converter.dry_load).values())
    assert all(p.is_meta for p in converter.model.parameters())


def test_both_generations_of_a_family_keep_the_keys_of_their_base(tmp_path):
    """A base that was saved fused stays fused; the per-expert format is what save_pretrained gives by default."""
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "per expert")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    for name in ("per expert", "fused"):
        folder = tmp_path / name
        converter = HubConverter(meta_model(folder), read_hub_tensors(folder))
        state = model.state_dict()
        got = {}
        for group in converter.groups:
            got |= converter.convert(group, {source: state[source] for source in group.sources})
        assert digests(got) == digests(read(folder))
    assert any("experts.0." in key for key in read(tmp_path / "per expert"))
    assert not any("experts.0." in key for key in read(tmp_path / "fused"))


def test_a_group_is_no_larger_than_conversion_needs(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    converter = HubConverter(meta_model(tmp_path), read_hub_tensors(tmp_path))
    assert all(len(group.sources) == 1 for group in converter.groups)
    fused = next(g for g in converter.groups if g.sources[0].endswith("0.mlp.experts.gate_up_proj"))
    assert len(fused.targets) == 16  # gate and up of eight experts


def test_a_shape_that_differs_from_the_base_is_named(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    base = read_hub_tensors(tmp_path)
    base["lm_head.weight"] = HubTensor("lm_head.weight", "F32", (65, 32), "model.safetensors")
    with pytest.raises(HubFormatError, match=r"lm_head.weight.*\(64, 32\).*\(65, 32\)"):
        HubConverter(meta_model(tmp_path), base)


def test_headers_are_read_without_the_data(tmp_path):
    save_file({"a": torch.zeros(3, 2), "b": torch.ones(5, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    tensors = read_hub_tensors(tmp_path)
    assert tensors["a"] == HubTensor("a", "F32", (3, 2), "model.safetensors")
    assert tensors["b"].size_bytes == 10


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 40) + b"{}", b"version https://git-lfs"])
def test_a_file_that_is_no_safetensors_file_is_told_apart(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(HubFormatError, match="not a safetensors file"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("has_preadv", [True, False])
def test_a_range_of_bytes_is_read_up_to_the_end_of_the_file(tmp_path, monkeypatch, has_preadv):
    if not has_preadv:
        monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.setattr(safetensors, "STAGING_BYTES", 7)
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with open(tmp_path / "file", "rb") as stream:
        inside, across = bytearray(50), bytearray(50)
        assert read_range(stream.fileno(), memoryview(inside), 10) == 50 and inside == bytes(range(10, 60))
        assert read_range(stream.fileno(), memoryview(across), 90) == 10 and across[:10] == bytes(range(90, 100))


def test_a_folder_without_weights_or_config_says_what_was_expected(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(HubFormatError, match=r"expected model.safetensors.index.json or .*found pytorch_model.bin"):
        read_hub_tensors(tmp_path)
    with pytest.raises(HubFormatError, match=r"no config\.json"):
        meta_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(HubFormatError, match="cannot read"):
        meta_model(tmp_path)


def test_an_index_that_names_a_missing_file_is_told(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HubFormatError, match=r"model-00001-of-00001.safetensors is missing"):
        read_hub_tensors(tmp_path)


def test_a_header_is_laid_out_as_safetensors_lays_it_out(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.float32),
        "a": torch.arange(3, dtype=torch.bfloat16),
        "c": torch.arange(2, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    theirs = read_header(tmp_path / "theirs.safetensors")
    described = [HubTensor(k, theirs[k].dtype, tuple(t.shape), "f") for k, t in tensors.items()]
    header, offsets = header_bytes(described)
    content = bytearray(header)
    for key in sorted(offsets, key=offsets.get):
        assert offsets[key] == len(content)
        content += tensors[key].reshape(-1).view(torch.uint8).numpy().tobytes()
    (tmp_path / "ours.safetensors").write_bytes(content)
    ours = load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(ours[k], t) and ours[k].dtype == t.dtype for k, t in tensors.items())
    ours = read_header(tmp_path / "ours.safetensors")
    assert {key: tensor.start for key, tensor in ours.items()} == {key: tensor.start for key, tensor in theirs.items()}


def test_shards_fill_in_order_and_one_file_has_the_plain_name():
    sizes = [("a", 40), ("b", 40), ("c", 90), ("d", 10)]
    assert shard_names(sizes, 100) == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
        "d": "model-00002-of-00002.safetensors",
    }
    assert set(shard_names(sizes, 1000).values()) == {"model.safetensors"}
    assert len(set(shard_names(sizes, 1).values())) == 4  # a tensor larger than the limit has a file to itself


@pytest.mark.parametrize(
    "text, size", [("5GB", 5_000_000_000), ("300 MiB", 314_572_800), ("1.5kb", 1500), ("12", 12), ("7 B", 7)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "-1GB", "0", "5XB", "GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(HubFormatError, match="is not a size"):
        parse_size(text)
