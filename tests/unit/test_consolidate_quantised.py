"""A base whose values need scales is refused by name: trained weights cannot be written after it."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from accel_moe.weights.quantised import scaled_tensors
from accel_moe.weights.safetensors import DTYPES, HubTensor
from tests.exports import make_trained, one_line_error, run, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def change_tensors(base, change):
    """Every tensor of the base, as `change(key, tensor)` gives it: a dict of what takes its place."""
    files = sorted(base.glob("*.safetensors"))
    index = {}
    for file in files:
        changed = {}
        for key, tensor in load_file(file).items():
            changed |= change(key, tensor)
        save_file({k: t.contiguous() for k, t in changed.items()}, file, metadata={"format": "pt"})
        index |= dict.fromkeys(changed, file.name)
    if len(files) > 1:
        (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.core
@pytest.mark.parametrize("keep", [[], ["--keep-extra"]])
@pytest.mark.parametrize(
    "dtype, scale",
    [
        (torch.float8_e4m3fn, "_scale_inv"),
        (torch.float8_e4m3fn, "_scale"),
        (torch.float8_e5m2, None),
        (torch.int8, "_scale"),
        (torch.int8, None),
        (torch.uint8, "_scale"),
    ],
)
def test_trained_tensors_in_a_dtype_that_carries_scales_are_refused_by_name(tmp_path, capsys, dtype, scale, keep):
    checkpoint, base, _ = make_trained(tmp_path, "qwen3_moe")

    def quantise(key, tensor):
        if key != EXPERT:
            return {key: tensor}
        scales = {} if scale is None else {key + scale: torch.ones(1)}
        return {key: tensor.to(dtype)} | scales

    change_tensors(base, quantise)
    line = one_line_error(capsys, *keep, checkpoint, tmp_path / "out", base)
    assert f"{EXPERT} is " in line and "dequantised copy" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "key, scale, shape",
    [
        ("weight_packed", "weight_scale", (24, 4)),
        ("qweight", "scales", (4, 24)),
        ("weight_blocks", "weight_scales", (24, 1, 16)),
        ("weight", "weight.absmax", (384, 1)),
    ],
)
def test_packed_weights_are_named_as_the_reason_why_the_base_does_not_fit(tmp_path, capsys, key, scale, shape):
    checkpoint, base, _ = make_trained(tmp_path, "qwen3_moe")
    owner = EXPERT.removesuffix("weight")

    def pack(name, tensor):
        if name != EXPERT:
            return {name: tensor}
        return {owner + key: torch.zeros(shape, dtype=torch.uint8), owner + scale: torch.ones(24, 2)}

    change_tensors(base, pack)
    line = one_line_error(capsys, checkpoint, tmp_path / "out", base)
    assert f"{owner}{key} is U8, with {(owner + scale).rpartition('.')[2]} beside it" in line


def test_a_dtype_that_only_quantised_formats_use_is_refused_by_name(tmp_path, capsys):
    checkpoint, base, _ = make_trained(tmp_path, "qwen3_moe")
    change_tensors(base, lambda key, tensor: {key: tensor.to(torch.int8) if key == EXPERT else tensor})
    for file in base.glob("*.safetensors"):
        file.write_bytes(file.read_bytes().replace(b'"dtype":"I8"', b'"dtype":"F4"'))
    line = one_line_error(capsys, checkpoint, tmp_path / "out", base)
    assert "dtype F4" in line and "dequantised copy" in line


@pytest.mark.parametrize(
    "where",
    [
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}),
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}),
        ("config.json", {"compression_config": {"format": "fp8"}}),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "fp8"}}),
    ],
)
def test_a_config_that_says_quantised_is_refused_wherever_it_says_so(tmp_path, capsys, where):
    checkpoint, base, _ = make_trained(tmp_path, "qwen3_moe")
    file, content = where
    old = json.loads((base / file).read_text()) if (base / file).exists() else {}
    (base / file).write_text(json.dumps(old | content))
    assert "is quantised" in one_line_error(capsys, checkpoint, tmp_path / "out", base)


@pytest.mark.core
def test_extra_tensors_of_integers_or_with_scales_are_kept_as_they_are(tmp_path):
    checkpoint, base, _ = make_trained(tmp_path, "qwen3_moe")
    extra = {
        "mtp.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "mtp.weight_scale_inv": torch.ones(1),
        "model.counts": torch.arange(4, dtype=torch.uint8),
        "model.steps": torch.tensor(7),
    }
    change_tensors(base, lambda key, tensor: {key: tensor} | (extra if key == EXPERT else {}))
    assert run("--verify", "--keep-extra", checkpoint, tmp_path / "out", base) == 0


def test_an_integer_buffer_that_no_scale_belongs_to_is_not_called_quantised():
    plain = {"a.position_ids": "I64", "a.mask": "U8", "a.weight": "F32", "a.weight_scale": "F32", "a.log_scale": "F32"}
    assert not scaled_tensors({key: HubTensor(key, dtype, (4,), "f") for key, dtype in plain.items()})
    assert {"F8_E4M3", "F8_E5M2"} <= set(DTYPES)


@pytest.mark.skipif(not hasattr(transformers, "Inkling2LoopForCausalLM"), reason="since transformers 5.24")
def test_the_experts_of_inkling2_loop_in_mxfp8_are_refused_and_a_dequantised_copy_of_that_base_will_do(
    tmp_path, capsys
):
    from tests.families import tiny_families

    config = tiny_families.tiny("inkling2_loop").config
    config.unpadded_vocab_size, config.moe_intermediate_size = config.vocab_size, 32

    def build(seed):
        torch.manual_seed(seed)
        return transformers.Inkling2LoopForCausalLM(config)

    build(0).save_pretrained(tmp_path / "dequantised")
    build(0).save_pretrained(tmp_path / "base")
    checkpoint = write_checkpoint(build(5), tmp_path / "checkpoint")

    def mxfp8(key, tensor):
        if not key.endswith(("experts.w13_weight", "experts.w2_weight")):
            return {key: tensor}
        blocks = (*tensor.shape[:2], tensor.shape[2] // 32)
        return {key: tensor.to(torch.float8_e4m3fn), f"{key}_scale": torch.full(blocks, 127, dtype=torch.uint8)}

    change_tensors(tmp_path / "base", mxfp8)
    line = one_line_error(capsys, checkpoint, tmp_path / "out", tmp_path / "base")
    assert "mlp.experts.w13_weight is F8_E4M3, with w13_weight_scale beside it" in line
    assert run("--verify", checkpoint, tmp_path / "out", tmp_path / "dequantised") == 0
