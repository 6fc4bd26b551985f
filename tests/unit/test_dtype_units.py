"""Which modules become FSDP units of their own, so that each unit has one dtype. No ranks."""

import pytest
import torch
from torch import nn

from accel_moe.dtype_units import units_of_one_dtype
from tests.tiny import tiny_model


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 8))
        self.norm = nn.LayerNorm(8).bfloat16()


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(8, 8).bfloat16()
        self.conv1d = nn.Conv1d(8, 8, 3)

    def forward(self, x):
        return nn.functional.conv1d(self.in_proj(x), self.conv1d.weight, self.conv1d.bias)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Router()
        self.mixer = Mixer()
        self.mlp = nn.Linear(8, 64).bfloat16()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(8, 16).bfloat16()


def policy(module):
    return isinstance(module, Layer)


def units(model, ignored=(), policy=policy):
    """The names of all units, as accelerate would make them, but for the root."""
    decide = units_of_one_dtype(model, policy, set(ignored))
    return [] if decide is None else [name for name, module in model.named_modules() if name and decide(module)]


def dtypes_by_unit(model, names):
    """The dtypes of the parameters in each unit: each belongs to the nearest one."""
    found = {name: set() for name in [*names, ""]}
    for name, parameter in model.named_parameters():
        owner = max((unit for unit in found if unit == "" or name.startswith(unit + ".")), key=len)
        found[owner].add(parameter.dtype)
    return found


def test_a_module_of_another_dtype_and_what_is_in_it_become_units_of_one_dtype():
    model = Model()
    found = units(model)
    assert all(len(dtypes) <= 1 for dtypes in dtypes_by_unit(model, found).values()), found
    assert {"layers.0", "layers.0.router", "layers.0.router.norm", "layers.1.router"} <= set(found)
    assert "layers.0.mlp" not in found and "head" not in found


def test_a_child_whose_weight_its_parent_reads_stays_in_the_unit_of_its_parent():
    found = units(Model())
    assert "layers.0.mixer" in found and "layers.0.mixer.in_proj" in found
    assert "layers.0.mixer.conv1d" not in found, "its forward never runs, so its weights would never be gathered"


def test_a_model_of_one_dtype_keeps_the_policy_it_had_and_no_source_is_read(monkeypatch):
    monkeypatch.setattr("accel_moe.dtype_units._reads", None)  # a class takes tenths of a second
    model = Model().float()
    for layer in model.layers:
        layer.mlp.bfloat16().requires_grad_(False)
    assert units_of_one_dtype(model, policy, set()) is policy
    assert units_of_one_dtype(model, None, set()) is None


def test_frozen_and_ignored_parameters_may_have_any_dtype():
    model = Model()
    for layer in model.layers:
        layer.router.requires_grad_(False)
    mixers = [p for layer in model.layers for p in layer.mixer.parameters()]
    assert units(model, ignored=mixers) == ["layers.0", "layers.1"]


def test_without_a_policy_the_rest_of_the_model_is_one_unit():
    model = Model()
    found = units(model, policy=None)
    assert "layers.0.router" in found and "layers.0" not in found
    assert all(len(dtypes) <= 1 for dtypes in dtypes_by_unit(model, found).values())


@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_of_another_dtype_go_with_what_accelerate_puts_beside_them(tie):
    model = tiny_model(tie=tie).bfloat16()
    model.lm_head.float()
    if tie:
        model.tie_weights()
    found = units(model, policy=lambda m: type(m).__name__ == "Qwen3MoeDecoderLayer")
    assert len(model.lm_head.weight) and model.lm_head.weight.dtype == torch.float32
    # tied: accelerate puts norm, embeddings and head into one unit, but leaves out what is one already
    assert ("model.norm" in found) if tie else ({"lm_head", "model.embed_tokens"} & set(found))
    assert not tie or not {"lm_head", "model.embed_tokens"} & set(found)


def test_a_module_with_two_dtypes_in_its_own_hands_is_refused_by_name():
    model = Model()
    model.layers[1].router.bias = nn.Parameter(torch.empty(4, dtype=torch.bfloat16))
    with pytest.raises(
        ValueError,
        match=r"layers\.1\.router \(Router\) has trained parameters of bfloat16 and float32.*mixed_precision",
    ):
        units(model)
