"""Every family's config, of the size of its class's defaults, is cut to two small layers that train."""

from __future__ import annotations

import pytest
import torch

from accel_moe import catalogue
from accel_moe.config import MoEConfig
from accel_moe.diagnosis import model, report, settings, shrink
from accel_moe.experts.recognise import find_experts
from accel_moe.mesh import plan_mesh
from tests.families import tiny_families

FLAGS = {
    "doge": {"is_moe": True},
    "gemma4": {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "qwen4_exp": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 16,
    },
    "deepseek_ocr2": {"mlp_layer_types": ["dense"] + ["sparse"] * 31},
    "step3p7": {"swiglu_limits": [None] * 43 + [7.0] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
}
"""What a published config says, and its class's defaults do not."""
SECTIONS = {"glm4v_moe": [8, 12, 12], "hy_v4_vl": [16, 8, 8], "ernie4_5_vl_moe": [22, 22, 20]}
NOT_A_SIZE = ("dtype", "architectures", "pad_token_id", "problem_type", "transformers_version")
FAMILIES = [source.name for source in tiny_families.families()]


def published(default, small, family: str):
    """`default`, with values for what it leaves open, as configs on the Hub have."""
    values = {n: v for n, v in vars(small).items() if n in vars(default) and v is not None and not n.startswith("_")}
    values = {n: v for n, v in values.items() if vars(default)[n] is None and n not in NOT_A_SIZE}
    for name, value in vars(default).items():
        if hasattr(value, "model_type"):
            values[name] = published(value, getattr(small, name), family).to_dict()
        elif name in FLAGS.get(family, {}):
            values[name] = FLAGS[family][name]
        elif name == "rope_parameters" and "mrope_section" in (getattr(small, name, None) or {}):
            own = {"mrope_section": SECTIONS.get(family, [24, 20, 20])}
            values[name] = {**small.rope_parameters, **own}
    return type(default)(**values)


def of_family(family: str):
    tiny = tiny_families.tiny(family)
    config = published(type(tiny.config)(), tiny.config, family)
    if not hasattr(tiny.model_class, "from_config"):
        config.architectures = [tiny.model_class.__name__]
    return config


@pytest.mark.parametrize(
    "family", [f if f in catalogue.OVER_RANKS else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_a_config_is_cut_to_a_small_model_of_the_same_class_that_trains(family):
    config = of_family(family)
    before = config.to_dict()
    small = shrink.shrunk(config)
    assert type(small) is type(config) and config.to_dict() == before
    model = shrink.small_model(small)
    own = {type(m) for m in find_experts(tiny_families.tiny(family).build()).values()}
    assert {type(m) for m in find_experts(model).values()} <= own
    tiny_families.output_of(model).float().square().mean().backward()
    assert sum(p.numel() for p in model.parameters()) < 500_000  # qwen4_exp keeps its n-gram table
    assert any(p.grad is not None and p.grad.any() for m in find_experts(model).values() for p in m.parameters())


def test_flags_gate_and_kinds_of_layers_stay():
    from transformers import DeepseekV3Config, GptOssConfig, NemotronHConfig, Qwen3MoeConfig

    qwen = shrink.shrunk(Qwen3MoeConfig(norm_topk_prob=True, tie_word_embeddings=True, num_key_value_heads=4))
    assert qwen.norm_topk_prob and qwen.tie_word_embeddings and qwen.num_key_value_heads < qwen.num_attention_heads
    deepseek = shrink.shrunk(DeepseekV3Config(routed_scaling_factor=1.7, q_lora_rank=None))
    assert (deepseek.routed_scaling_factor, deepseek.q_lora_rank, deepseek.first_k_dense_replace) == (1.7, None, 1)
    assert shrink.shrunk(GptOssConfig(layer_types=["full_attention", "sliding_attention"] * 18)).layer_types == [
        "full_attention",
        "sliding_attention",
    ]
    kinds = ["mamba", "moe", "mamba", "attention", "moe", "mamba"]
    nemotron = shrink.shrunk(NemotronHConfig(layers_block_type=kinds))
    assert nemotron.layers_block_type == ["linear_attention", "moe"]


def test_a_number_of_experts_that_ep_divides_is_kept():
    from transformers import Qwen3MoeConfig

    assert shrink.shrunk(Qwen3MoeConfig(), num_experts=9).num_experts == 9
    assert shrink.shrunk(Qwen3MoeConfig(num_experts=4)).num_experts == 4


def test_a_model_without_experts_is_refused_in_words():
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="no model with experts comes of LlamaConfig"):
        shrink.small_model(shrink.shrunk(LlamaConfig()))


def test_the_same_numbers_come_in_every_process():
    from transformers import Qwen3MoeConfig

    config = shrink.shrunk(Qwen3MoeConfig())
    first, second = (dict(shrink.small_model(config).named_parameters()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# jitter; hashed routing; a dense layer beside experts; state-space layers; identity experts; layer lists
UNUSUAL = [("phimoe", 2), ("deepseek_v4", 2), ("gemma4", 2), ("nemotron_h", 2), ("longcat_flash", 1), ("step3p7", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("family, ep", UNUSUAL)
def test_the_doctor_has_no_cross_for_an_unusual_family(family, ep, tmp_path):
    of_family(family).save_pretrained(tmp_path)
    in_force = settings.Settings(MoEConfig(moe_ep_degree=ep), plan_mesh(2, ep), False)
    lines = list(model.lines(model.read(str(tmp_path)), in_force))
    assert [line.subject for line in lines][-1] == "from_pretrained"
    assert not [line for line in lines if line.mark == report.FAILED]
