"""Adapters on a model whose weights wait: PEFT's own values, and the base's from the files. Comparisons are exact."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import accel_moe
from accel_moe import hooks
from accel_moe.weights import fill
from accel_moe.weights.plan import check_unchanged, pending
from tests.adapters import EXPERTS, wrap
from tests.tiny import tiny_model

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("many_ranks")
ALL = dict(target_modules=["q_proj"], target_parameters=[*EXPERTS, "mlp.gate.weight"])


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model().to(getattr(torch, request.param)).save_pretrained(folder)
    return folder


def both(base, change):
    """The state dicts of `change(model)`, of our model and of one that was loaded whole, from the same seed."""
    states = []
    for load in (accel_moe.from_pretrained, AutoModelForCausalLM.from_pretrained):
        torch.manual_seed(3)
        model = change(load(base))
        if (waiting := pending(model)) is not None:
            check_unchanged(model, waiting.plan)
            assert all(p.is_meta for n, p in model.named_parameters() if "q_proj" in n and "lora_" not in n)
            fill.fill(model, torch.device("cpu"))
        states.append((dict(model.state_dict()), [n for n, p in model.named_parameters() if p.requires_grad]))
    return states


def assert_same(ours, plain) -> None:
    (got, trains), (want, trained) = ours, plain
    assert got.keys() == want.keys() and trains == trained
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


@pytest.mark.core
@pytest.mark.parametrize(
    "options",
    [
        ALL,
        {**ALL, "init_lora_weights": "gaussian"},
        {**ALL, "init_lora_weights": False},
        dict(target_modules=["q_proj"], init_lora_weights="orthogonal"),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        dict(target_modules=["embed_tokens", "v_proj"]),
        dict(target_modules="all-linear", bias="all"),
    ],
    ids=["all", "gaussian", "random B", "orthogonal", "trained whole", "embeddings", "all linear"],
)
def test_an_adapter_begins_with_the_values_that_it_has_on_a_model_loaded_whole(base, options):
    from peft import LoraConfig, get_peft_model

    assert_same(*both(base, lambda model: get_peft_model(model, LoraConfig(r=4, **options))))


def test_a_second_adapter_has_its_values_too(base):
    from peft import LoraConfig, get_peft_model

    def change(model):
        wrapped = get_peft_model(model, LoraConfig(r=4, **ALL))
        wrapped.add_adapter("second", LoraConfig(r=4, target_modules=["v_proj"]))
        return wrapped

    assert_same(*both(base, change))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_trained_adapter_is_loaded_to_go_on(base, tmp_path, low_cpu_mem_usage):
    from peft import PeftModel

    trained = wrap(tiny_model(), **ALL)
    trained.save_pretrained(tmp_path)

    def change(model):
        return PeftModel.from_pretrained(model, tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)

    ours, plain = both(base, change)
    assert_same(ours, plain)
    name = "base_model.model.model.layers.1.mlp.experts.lora_B.default.weight"
    saved = dict(trained.named_parameters())[name].detach()
    # with low_cpu_mem_usage PEFT rounds an adapter to the base's dtype: bf16 has 8 bits of mantissa
    torch.testing.assert_close(ours[0][name].float(), saved, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(init_lora_weights="pissa"), "init_lora_weights: pissa"),
        (dict(init_lora_weights="olora"), "init_lora_weights: olora"),
        (dict(use_dora=True), "use_dora: True"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
    ],
)
def test_an_adapter_that_is_computed_from_the_base_s_values_is_refused(base, options, told):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=rf"{told}, which is computed from the base's values.*transformers' from_pre"):
        get_peft_model(accel_moe.from_pretrained(base), LoraConfig(target_modules=["q_proj"], **options))


def test_without_the_patch_the_adapter_would_be_refused_by_name(base, monkeypatch):
    """A negative control: an older PEFT, whose functions have other parameters, is left alone."""
    from accel_moe import patching

    monkeypatch.setattr(patching, "off_leash", lambda one: "moved" if one in hooks.WAITING_TABLE else None)
    model = wrap(accel_moe.from_pretrained(base), **ALL)
    with pytest.raises(ValueError, match=r"q_proj\.lora_A.*was added on meta after .*accel_moe\.prepare\(model\)"):
        check_unchanged(model, pending(model).plan)


def test_a_peft_that_cannot_be_imported_disturbs_nobody(base, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft.tuners.lora.layer", None)
    model = accel_moe.from_pretrained(base)
    fill.fill(model, torch.device("cpu"))
    assert_same((model.state_dict(), []), (AutoModelForCausalLM.from_pretrained(base).state_dict(), []))
