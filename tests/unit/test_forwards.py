"""Experts stay ours whoever patches their forward, and whenever: Liger's gives way, any other is an error by name."""

import copy
import types

import pytest
import torch
from torch import nn

import accel_moe
from accel_moe.experts import forwards
from tests.tiny import batches, tiny_model

LAYER = r"model\.layers\.1\.mlp\.experts"


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def stand_in(self, hidden_states, top_k_index, top_k_weights):
    raise AssertionError("Liger's experts ran")


stand_in.__module__ = "liger_kernel.transformers.swiglu"


def as_liger_does(model, name="mlp.experts"):
    """liger_kernel.transformers.monkey_patch._patch_swiglu_module, on every layer's experts."""
    for layer in model.model.layers:
        module = layer.get_submodule(name)
        get_name = lambda self: "LigerExperts"  # noqa: E731
        get_name.__module__ = "liger_kernel.transformers.monkey_patch"
        module.__dict__["forward"] = stand_in.__get__(module, module.__class__)
        module.__dict__["_get_name"] = get_name.__get__(module, module.__class__)


def foreign(self, hidden_states, top_k_index, top_k_weights):
    return hidden_states


def counted(model) -> bool:
    """Whether every layer's experts, and they alone, computed the model's output."""
    batch = batches(1)[0]
    expected = tiny_model()(input_ids=batch).logits
    torch.testing.assert_close(model(input_ids=batch).logits, expected, rtol=0, atol=1e-5)
    return all(counts.sum() == 2 * batch.numel() for counts in accel_moe.expert_load(model).values())


@pytest.mark.parametrize("order", ["before prepare", "after prepare", "both", "of a copy"])
def test_ligers_forward_on_the_experts_gives_way_to_ours_in_any_order(order, caplog):
    model = tiny_model()
    with caplog.at_level("INFO", logger="accel_moe"):
        if order in ("before prepare", "both"):
            as_liger_does(model)
        accel_moe.prepare(model)
        if order == "of a copy":
            model = copy.deepcopy(model)
        if order != "before prepare":
            as_liger_does(model)
        assert counted(model)
    assert "Liger's forward of 2 experts layers gave way to ours" in caplog.text or order != "before prepare"
    layer = model.model.layers[0].mlp.experts
    assert not {"forward", "_get_name"} & set(vars(layer)) and "ScatterMoE" in repr(layer)


def test_ligers_forward_on_a_peft_wrapper_around_the_experts_gives_way(monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_parameters=["mlp.experts.down_proj"], init_lora_weights=True)
    model = accel_moe.prepare(tiny_model())
    wrapped = peft.get_peft_model(model, config)
    as_liger_does(model)
    forwards.take_back(wrapped)
    assert counted(wrapped)


class LigerExperts(nn.Module):
    """As liger_kernel.transformers.swiglu.LigerExperts."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, self.hidden_dim = config.num_experts, config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError("Liger's experts ran")


LigerExperts.__module__ = "liger_kernel.transformers.swiglu"


def test_a_model_that_was_made_with_ligers_experts_class_runs_ours(monkeypatch):
    monkeypatch.setattr("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts", LigerExperts)
    model = tiny_model()
    assert type(model.model.layers[0].mlp.experts) is LigerExperts
    with pytest.raises(AssertionError, match="Liger's experts ran"):
        model(input_ids=batches(1)[0])
    monkeypatch.undo()
    assert counted(accel_moe.prepare(model))


def on_the_instance(layer, setattr_):
    layer.forward = types.MethodType(foreign, layer)


def in_its_class(layer, setattr_):
    family = next(cls for cls in type(layer).__mro__ if cls.__name__ == "Qwen3MoeExperts")
    setattr_(family, "forward", foreign)


def in_the_swapped_class(layer, setattr_):
    setattr_(type(layer), "forward", foreign)


@pytest.mark.parametrize("patch", [on_the_instance, in_its_class])
def test_another_forward_before_prepare_is_refused_by_the_layers_name(patch, monkeypatch):
    model = tiny_model()
    patch(model.model.layers[1].mlp.experts, monkeypatch.setattr)
    with pytest.raises(
        ValueError, match=r"model\.layers\.\d\.mlp\.experts .*tests\.unit\.test_forwards\.foreign was put"
    ):
        accel_moe.prepare(model)


@pytest.mark.parametrize("patch", [on_the_instance, in_its_class, in_the_swapped_class])
def test_another_forward_after_prepare_is_refused_by_the_layers_name(patch, monkeypatch):
    model = accel_moe.prepare(tiny_model())
    patch(model.model.layers[1].mlp.experts, monkeypatch.setattr)
    with pytest.raises(ValueError, match=r"model\.layers\.\d\.mlp\.experts \(ScatterMoE.*foreign was put in its place"):
        forwards.take_back(model)


def test_another_forward_is_refused_in_the_first_forward_at_the_latest():
    model = accel_moe.prepare(tiny_model())
    on_the_instance(model.model.layers[1].mlp.experts, setattr)
    with pytest.raises(ValueError, match=rf"{LAYER} \(ScatterMoE.*foreign was put in its place, on the module itself"):
        model(input_ids=batches(1)[0])


def test_after_the_first_forward_nothing_is_looked_at_any_more():
    model = accel_moe.prepare(tiny_model())
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert [type(hook) for hook in hooks] == [forwards.FirstForward] * 2
    model(input_ids=batches(1)[0])
    assert not any(module._forward_pre_hooks for module in model.modules())


def liger_config():
    return dict(
        rope=False, rms_norm=False, cross_entropy=False, fused_linear_cross_entropy=False, swiglu=True
    )  # its other kernels need a GPU


@pytest.mark.parametrize("order", ["before", "after", "class"])
def test_liger_itself_leaves_the_experts_to_us(order, monkeypatch):
    liger = pytest.importorskip("liger_kernel.transformers")
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    monkeypatch.setattr(modeling_qwen3_moe, "Qwen3MoeExperts", modeling_qwen3_moe.Qwen3MoeExperts)  # to be put back
    if order == "class":
        liger.apply_liger_kernel_to_qwen3_moe(**liger_config())
    model = tiny_model()
    if order == "before":
        liger._apply_liger_kernel_to_instance(model, **liger_config())
    accel_moe.prepare(model)
    if order == "after":
        liger._apply_liger_kernel_to_instance(model, **liger_config())
    monkeypatch.undo()
    assert counted(model)
