"""A kernel that is asked for by name is tried before it is trusted: what it does not compute, it is refused for.

The wrong ones here are like those that there are: sonicmoe, which reads the activation's name and no gate; deepgemm,
which has no backward; and what a user's own function may forget.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

import accel_moe
from accel_moe.experts import recognise
from accel_moe.experts.state import prepared_state
from tests.families import tiny_families
from tests.tiny import tiny_model


def interface():
    from transformers.integrations import moe

    return moe.ALL_EXPERTS_FUNCTIONS


def grouped(self, hidden_states, top_k_index, top_k_weights):
    return interface()["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)


def rows_of(self, hidden_states, top_k_index, top_k_weights, gate=None, bias=True):
    """The maths, slot by slot; slots of other ranks compute expert 0 with their own weight, 0."""
    index = torch.where(top_k_index < self.num_experts, top_k_index, 0)
    rows = hidden_states[:, None, None, :].expand(-1, index.shape[1], -1, -1)
    up = self.gate_up_proj if self.has_gate else self.up_proj
    turn = (lambda w: w) if self.is_transposed else (lambda w: w.mT)
    h = (rows @ turn(up)[index])[:, :, 0]
    y = gate or (self._apply_gate if self.has_gate else self.act_fn)
    if self.has_bias and bias:
        h = h + self.gate_up_proj_bias[index]
    out = (y(h)[:, :, None] @ turn(self.down_proj)[index])[:, :, 0]
    if self.has_bias and bias:
        out = out + self.down_proj_bias[index]
    return out * top_k_weights[..., None].to(out.dtype)


def right(self, hidden_states, top_k_index, top_k_weights):
    return rows_of(self, hidden_states, top_k_index, top_k_weights).sum(1).to(hidden_states.dtype)


def plain_swiglu(self, hidden_states, top_k_index, top_k_weights):
    """As sonicmoe, which hands the layout and the activation's name to its kernel."""

    def gate(h):
        first, second = h.chunk(2, -1) if self.is_concatenated else (h[..., ::2], h[..., 1::2])
        return torch.nn.functional.silu(first) * second

    return rows_of(self, hidden_states, top_k_index, top_k_weights, gate).sum(1)


def no_biases(self, hidden_states, top_k_index, top_k_weights):
    return rows_of(self, hidden_states, top_k_index, top_k_weights, bias=False).sum(1)


def no_backward(self, hidden_states, top_k_index, top_k_weights):
    """As deepgemm."""
    with torch.no_grad():
        return right(self, hidden_states, top_k_index, top_k_weights)


def nothing_for_the_router(self, hidden_states, top_k_index, top_k_weights):
    return right(self, hidden_states, top_k_index, top_k_weights.detach())


def nothing_for_the_experts(self, hidden_states, top_k_index, top_k_weights):
    view = SimpleNamespace(**{n: getattr(self, n).detach() for n in ("gate_up_proj", "down_proj")})
    for name in ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate"):
        setattr(view, name, getattr(self, name))
    return right(view, hidden_states, top_k_index, top_k_weights)


def half_the_gradient(self, hidden_states, top_k_index, top_k_weights):
    out = right(self, hidden_states, top_k_index, top_k_weights)
    return out / 2 + out.detach() / 2


def unweighted(self, hidden_states, top_k_index, top_k_weights):
    return right(self, hidden_states, top_k_index, torch.ones_like(top_k_weights))


def garbage_for_other_ranks(self, hidden_states, top_k_index, top_k_weights):
    away = (top_k_index >= self.num_experts)[..., None]
    rows = rows_of(self, hidden_states, top_k_index, top_k_weights)
    return torch.where(away, float("nan"), rows).sum(1)


def other_ranks_slots_are_its_last_experts(self, hidden_states, top_k_index, top_k_weights):
    weights = torch.where(top_k_index < self.num_experts, top_k_weights, 1.0)
    return right(self, hidden_states, top_k_index.clamp(max=self.num_experts - 1), weights)


def cannot(self, hidden_states, top_k_index, top_k_weights):
    raise RuntimeError("needs a chip of another kind\nand more words")


def not_installed(self, hidden_states, top_k_index, top_k_weights):
    import a_package_that_nobody_has  # noqa: F401  # pyright: ignore


@pytest.fixture
def named(monkeypatch):
    """Registers a function under its own name, for one test."""

    def register(function):
        monkeypatch.setitem(type(interface())._global_mapping, function.__name__, function)
        return function.__name__

    return register


def refusal(model, **options) -> str:
    with pytest.raises(ValueError) as refused:
        accel_moe.prepare(model, **options)
    assert prepared_state(model) is None
    return str(refused.value)


def family(name: str):
    return tiny_model(name) if name in ("qwen3_moe", "mixtral") else tiny_families.tiny(name).build()


@pytest.mark.parametrize("name", ["sonicmoe", "deepgemm"])
def test_a_kernel_whose_package_or_gpu_is_missing_is_refused_when_the_model_is_prepared(name):
    if torch.cuda.is_available():
        pytest.skip("what is missing here is a GPU")
    message = refusal(tiny_model(), moe_kernel=name)
    assert f"qwen3_moe: cannot prepare model.layers.0.mlp.experts (Qwen3MoeExperts): moe_kernel={name} " in message
    assert "cannot run here" in message and message.endswith("Use moe_kernel: auto.")


def test_a_missing_module_is_named(named):
    assert "cannot run here: No module named 'a_package_that_nobody_has'" in refusal(
        tiny_model(), moe_kernel=named(not_installed)
    )


@pytest.mark.parametrize("name", ["gpt_oss", "step3p7", "deepseek_v4"])
def test_a_kernel_that_takes_every_gate_for_plain_swiglu_is_refused_for_a_clamped_or_scaled_one(name, named):
    message = refusal(family(name), moe_kernel=named(plain_swiglu))
    assert "cannot prepare" in message and "does not compute it (its gate: silu gate" in message
    assert "its output is off by" in message


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_the_same_kernel_is_taken_where_the_gate_is_plain_swiglu(name, named):
    accel_moe.prepare(family(name), moe_kernel=named(plain_swiglu))
    accel_moe.prepare(family(name), moe_kernel=named(plain_swiglu), moe_ep_degree=2)


def test_a_kernel_that_forgets_biases_is_refused_where_there_are_some(named):
    assert "its output is off by" in refusal(family("gpt_oss"), moe_kernel=named(no_biases))
    accel_moe.prepare(family("qwen3_moe"), moe_kernel=named(no_biases))


@pytest.mark.parametrize(
    "function, says",
    [
        (no_backward, "it has no backward: nothing before it, and no expert, would learn"),
        (nothing_for_the_router, "it has no gradient of top_k_weights, which would not learn"),
        (nothing_for_the_experts, "it has no gradient of gate_up_proj, which would not learn"),
        (half_the_gradient, "its gradient of hidden_states is off by"),
        (unweighted, "its output is off by"),
        (cannot, "fails on a small copy of it: RuntimeError: needs a chip of another kind. Use moe_kernel: auto"),
    ],
)
def test_what_a_named_kernel_gets_wrong_is_said(function, says, named):
    assert says in refusal(tiny_model(), moe_kernel=named(function))


@pytest.mark.parametrize("function", [garbage_for_other_ranks, other_ranks_slots_are_its_last_experts])
def test_a_kernel_that_computes_slots_of_other_ranks_is_refused_over_ranks_only(function, named):
    name = named(function)
    assert "its output is" in refusal(tiny_model(), moe_kernel=name, moe_ep_degree=2)
    accel_moe.prepare(tiny_model(), moe_kernel=name)


def test_a_kernel_without_a_backward_is_taken_for_a_model_that_does_not_train(named):
    accel_moe.prepare(tiny_model().requires_grad_(False), moe_kernel=named(no_backward))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "step3p7", "deepseek_v4"])
@pytest.mark.parametrize("function", [right, grouped])
def test_a_right_kernel_is_taken_for_every_layout(name, function, named):
    for dtype in (torch.float32, torch.bfloat16):
        for degree in (1, 2):
            model = family(name).to(dtype)
            accel_moe.prepare(model, moe_kernel=named(function), moe_ep_degree=degree)
            assert prepared_state(model).kernel == function.__name__


@pytest.mark.slow
@pytest.mark.parametrize("source", tiny_families.families(), ids=lambda source: source.name)
def test_a_right_kernel_is_taken_for_every_family(source, named):
    model = tiny_families.tiny(source.name).build()
    layers = recognise.find_experts(model)
    for degree in (1, 2):
        if any(recognise.refusal(m, kernel=named(grouped), ep_degree=degree) for m in layers.values()):
            continue
        accel_moe.prepare(tiny_families.tiny(source.name).build(), moe_kernel="grouped", moe_ep_degree=degree)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_trial_leaves_no_trace(mode, named):
    def with_random_numbers(self, *args):
        torch.randn(3)
        return right(self, *args)

    model = tiny_model()
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    with mode(), torch.device("meta"):
        accel_moe.prepare(model, moe_kernel=named(with_random_numbers))
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, values[n]) for n, p in model.named_parameters())


def big_experts():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

    config = GptOssConfig(num_hidden_layers=24, num_local_experts=128)
    with torch.device("meta"):
        return GptOssForCausalLM(config)


def test_experts_of_real_size_on_meta_are_tried_in_well_under_a_second(named):
    accel_moe.prepare(big_experts(), moe_kernel=named(grouped))  # what is imported and compiled once
    model = big_experts()
    since = time.process_time()
    accel_moe.prepare(model, moe_kernel="grouped", moe_ep_degree=8)
    assert time.process_time() - since < 1.0
    assert "does not compute it" in refusal(big_experts(), moe_kernel=named(plain_swiglu))
