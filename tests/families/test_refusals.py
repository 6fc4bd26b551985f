"""What is not understood is refused by name, with the reason; nothing is run on a guess."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import accel_moe
from accel_moe import catalogue
from accel_moe.experts import layer as experts_layer
from accel_moe.experts import recognise, view
from tests.families import tiny_families
from tests.tiny import tiny_model

OFF_INTERFACE = [
    s for s in catalogue.sources() if not s.decorated and not any(name in view.SHIMS for _, name in s.lookalikes)
]


@pytest.mark.parametrize("source", OFF_INTERFACE, ids=lambda source: source.name)
def test_a_family_off_the_interface_is_refused_with_its_name_and_the_reason(source):
    model = tiny_families.off_interface_model(source)
    with pytest.raises(ValueError) as refused:
        accel_moe.prepare(model)
    assert f"model_type {model.config.model_type}" in str(refused.value)
    assert recognise.OFF_INTERFACE[source.name] in str(refused.value)
    assert any(name in str(refused.value) for _, name in source.lookalikes)


def test_a_family_that_nobody_has_looked_at_is_refused_all_the_same():
    class StrangeExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(8, 4, 4))

    model = nn.Sequential(StrangeExperts())
    with pytest.raises(ValueError, match="StrangeExperts, but they keep the experts in a form of their own"):
        accel_moe.prepare(model)


def first_experts(model: nn.Module) -> nn.Module:
    return model.model.layers[0].mlp.experts


class FP8Experts(nn.Module):
    """Shaped like transformers' class of the name (integrations/finegrained_fp8.py)."""

    def __init__(self):
        super().__init__()
        weight = torch.zeros(8, 48, 32).to(torch.float8_e4m3fn)
        self.gate_up_proj = nn.Parameter(weight, requires_grad=False)
        self.gate_up_proj_scale_inv = nn.Parameter(torch.ones(8, 1, 1))
        self.down_proj = nn.Parameter(weight.transpose(1, 2).contiguous(), requires_grad=False)
        self.down_proj_scale_inv = nn.Parameter(torch.ones(8, 1, 1))


class Mxfp4GptOssExperts(nn.Module):
    """Shaped like transformers' class of the name (integrations/mxfp4.py)."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(8, 48, 16, dtype=torch.uint8), requires_grad=False)
        self.down_proj = nn.Parameter(torch.zeros(8, 32, 12, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("quantised", [FP8Experts, Mxfp4GptOssExperts])
def test_quantised_experts_are_refused_by_name_even_beside_plain_ones(quantised):
    model = tiny_model("qwen3_moe")
    model.model.layers[1].mlp.experts = quantised()
    with pytest.raises(ValueError, match=rf"quantised experts \({quantised.__name__}\).*qwen3_moe"):
        accel_moe.prepare(model)


def test_the_real_class_of_fp8_experts_is_refused():
    from transformers.integrations.finegrained_fp8 import FP8Experts as RealExperts

    model = tiny_model("qwen3_moe")
    with torch.device("meta"):
        model.model.layers[1].mlp.experts = RealExperts(model.config, block_size=(16, 16))
    with pytest.raises(ValueError, match=r"quantised experts \(FP8Experts\)"):
        accel_moe.prepare(model)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"has_bias": True}, "its flags say that it has down_proj_bias, gate_up_proj_bias, and it has not"),
        ({"has_gate": False}, "its flags say that it has up_proj, and it has not"),
    ],
)
def test_flags_and_parameters_that_do_not_fit_each_other_are_refused(flags, reason):
    model = tiny_model("qwen3_moe")
    vars(first_experts(model)).update(flags)
    with pytest.raises(ValueError, match=reason):
        accel_moe.prepare(model)


def test_a_bias_that_no_flag_speaks_of_is_refused():
    model = tiny_model("qwen3_moe")
    layer = first_experts(model)
    layer.down_proj_bias = nn.Parameter(torch.zeros(8, 32))
    with pytest.raises(ValueError, match="down_proj_bias, which its flags say it does not use"):
        accel_moe.prepare(model)


def test_a_shim_refuses_its_class_with_other_parameters_or_another_call():
    Step3p7Experts = type("Step3p7Experts", (nn.Module,), {"forward": lambda self, hidden_states, routing: None})
    layer = Step3p7Experts()
    layer.gate_up_proj = nn.Parameter(torch.zeros(8, 48, 32))
    layer.down_proj = nn.Parameter(torch.zeros(8, 32, 24))
    assert view.shim_of(layer) is None
    with pytest.raises(ValueError, match="Step3p7Experts, but they keep the experts in a form of their own"):
        accel_moe.prepare(nn.Sequential(layer))


def test_identity_experts_run_on_one_rank_and_are_refused_over_several():
    model = tiny_families.tiny("longcat_flash").build()
    with pytest.raises(ValueError, match=r"identity experts.*moe_ep_degree=2 cannot split it"):
        accel_moe.prepare(model, moe_ep_degree=2)


def test_experts_that_only_some_batches_call_are_refused_over_several_ranks():
    """ernie4_5_vl_moe's block asks `moe_mm_token_type_ids.any()`: ranks with and without images would part."""
    model = tiny_families.tiny("ernie4_5_vl_moe").build()
    with pytest.raises(ValueError, match=r"vision experts run only for a batch that has images.*moe_ep_degree=2"):
        accel_moe.prepare(model, moe_ep_degree=2)


def test_experts_that_two_layers_share_are_refused_over_several_ranks_and_stay_shared_on_one():
    """As diffusion_gemma ties its encoder's to its decoder's."""
    model = tiny_model("qwen3_moe")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.experts.down_proj and .*layers.1.mlp.experts.down_proj are one"
    ):
        accel_moe.prepare(model, moe_ep_degree=2)
    assert not any(isinstance(m, experts_layer.ScatterMoE) for m in model.modules())
    accel_moe.prepare(model)
    assert second.down_proj is first.down_proj


def test_the_family_that_ties_its_experts_is_refused_over_several_ranks():
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as family

    config = tiny_families.tiny_config(family.DiffusionGemmaConfig, "diffusion_gemma")
    if config.vision_config is None:  # the default of transformers 5.17
        config.vision_config = transformers.Gemma4VisionConfig()
    with torch.device("meta"):
        model = family.DiffusionGemmaModel(config)
    model.tie_weights()
    with pytest.raises(ValueError, match="are one weight \\(tied experts\\)"):
        accel_moe.prepare(model, moe_ep_degree=2)


def test_a_norm_after_the_experts_is_refused_over_several_ranks():
    """On transformers that have muse_spark, and there only: see the sweep for one rank."""
    if "muse_spark" not in {s.name for s in tiny_families.families()}:
        pytest.skip("this transformers has no family with a norm after its experts")
    model = tiny_families.tiny("muse_spark").build()
    with pytest.raises(ValueError, match=r"normalises each expert's output.*moe_ep_degree=2"):
        accel_moe.prepare(model, moe_ep_degree=2)


def test_a_norm_after_the_experts_is_refused_for_a_kernel_that_has_none():
    if "muse_spark" not in {s.name for s in tiny_families.families()}:
        pytest.skip("this transformers has no family with a norm after its experts")
    model = tiny_families.tiny("muse_spark").build()
    with pytest.raises(ValueError, match=r"normalises each expert's output.*moe_kernel=scattermoe does not"):
        accel_moe.prepare(model, moe_kernel="scattermoe")
