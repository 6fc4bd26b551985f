"""The swap: what it changes, what it leaves alone, what it refuses. One process, no group."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import accel_moe
from accel_moe.dispatch.base import Dispatched
from accel_moe.dispatch.replay import kept_exchanges
from accel_moe.experts import layer as experts_layer
from accel_moe.experts import recognise
from accel_moe.experts.state import prepared_state, swapped_layers
from accel_moe.experts.work import view_of
from tests.tiny import batches, tiny_model

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe", "glm4_moe"]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """`auto` takes grouped_mm here; tests of scattermoe say so."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def loss_and_gradients(model):
    batch = batches(1)[0]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.core
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prepared_model_computes_what_the_eager_one_does(family):
    model = tiny_model(family)
    eager = copy.deepcopy(model)
    eager.set_experts_implementation("eager")
    loss, gradients = loss_and_gradients(accel_moe.prepare(model))
    expected_loss, expected = loss_and_gradients(eager)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-5)
    for name, gradient in expected.items():  # another order of summation: a few ulp of the largest term
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item() + 1e-9)


def test_a_prepared_layer_compiles_into_one_graph():
    layer = accel_moe.prepare(tiny_model()).model.layers[0].mlp.experts
    rows, index, weights = torch.randn(5, 32), torch.randint(8, (5, 2)), torch.rand(5, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(rows, index, weights), layer(rows, index, weights))


def test_prepare_copies_no_weight_and_keeps_names_and_shapes():
    model = tiny_model()
    before = {n: (p, p.data_ptr(), p.shape) for n, p in model.named_parameters()}
    buffers = {n: b for n, b in model.named_buffers()}
    accel_moe.prepare(model)
    after = {n: (p, p.data_ptr(), p.shape) for n, p in model.named_parameters()}
    assert before.keys() == after.keys()
    assert all(before[n][0] is after[n][0] and before[n][1:] == after[n][1:] for n in before)
    assert buffers.keys() == dict(model.named_buffers()).keys()


def test_prepare_returns_the_same_object_and_is_idempotent():
    model = tiny_model()
    assert accel_moe.prepare(model) is model
    classes = [type(m) for m in model.modules()]
    assert accel_moe.prepare(model) is model
    assert classes == [type(m) for m in model.modules()]


def test_prepare_again_with_other_settings_is_refused():
    model = accel_moe.prepare(tiny_model())
    with pytest.raises(ValueError, match=r"already prepared with .*moe_ep_degree=1.* again with .*moe_ep_degree=2"):
        accel_moe.prepare(model, moe_ep_degree=2)


def test_print_shows_the_layers_their_experts_and_the_kernel():
    text = repr(accel_moe.prepare(tiny_model(), moe_ep_degree=2))
    assert "ScatterMoEQwen3MoeExperts(" in text
    assert "experts=8, local=4, ep=2, kernel=grouped_mm" in text


def test_a_swapped_module_is_still_an_instance_of_its_own_class():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    model = accel_moe.prepare(tiny_model())
    assert sum(isinstance(m, Qwen3MoeExperts) for m in model.modules()) == 2


def test_a_prepared_model_can_be_copied_and_saved(tmp_path):
    model = accel_moe.prepare(tiny_model())
    batch = batches(1)[0]
    expected = model(input_ids=batch).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=batch).logits, expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(again(input_ids=batch).logits, expected, rtol=0, atol=1e-6)


def test_scattermoe_is_registered_with_transformers_at_import():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert "scattermoe" in ALL_EXPERTS_FUNCTIONS.valid_keys()
    model = tiny_model()
    model.set_experts_implementation("scattermoe")


def test_auto_takes_scattermoe_where_triton_can_run_and_grouped_mm_elsewhere(monkeypatch):
    layers = recognise.find_experts(tiny_model())
    monkeypatch.setattr(recognise, "triton_can_run", lambda: True)
    assert recognise.choose_kernel("auto", layers) == "scattermoe"
    monkeypatch.setattr(recognise, "triton_can_run", lambda: False)
    assert recognise.choose_kernel("auto", layers) == "grouped_mm"
    with pytest.raises(ValueError, match="moe_kernel=scattermoe needs a CUDA GPU"):
        recognise.choose_kernel("scattermoe", layers)


def test_bf16_experts_do_not_run_in_the_interpreter_whose_products_of_them_are_garbage(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layers = recognise.find_experts(tiny_model().bfloat16())
    assert recognise.choose_kernel("auto", layers) == "grouped_mm"
    with pytest.raises(ValueError, match=r"bfloat16 under TRITON_INTERPRET=1.*Load the model in float32"):
        recognise.choose_kernel("scattermoe", layers)
    assert recognise.choose_kernel("auto", recognise.find_experts(tiny_model())) == "scattermoe"


def test_an_unregistered_kernel_is_refused_with_the_registered_ones():
    with pytest.raises(ValueError, match=r"moe_kernel='nope' is not registered.*grouped_mm"):
        accel_moe.prepare(tiny_model(), moe_kernel="nope")


def test_another_registered_kernel_can_be_named():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    calls = []

    def mine(self, hidden_states, top_k_index, top_k_weights):
        calls.append(len(hidden_states))
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS.register("mine", mine)
    layer = recognise.find_experts(accel_moe.prepare(tiny_model(), moe_kernel="mine"))["model.layers.0.mlp.experts"]
    calls.clear()
    plain = recognise.find_experts(accel_moe.prepare(tiny_model()))["model.layers.0.mlp.experts"]
    inputs = torch.randn(3, 32), torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.rand(3, 2)
    torch.testing.assert_close(layer(*inputs), plain(*inputs))
    assert calls == [3]


def test_a_model_without_experts_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    )
    with pytest.raises(ValueError, match=r"no experts layer in LlamaForCausalLM \(model_type llama\).*dense model"):
        accel_moe.prepare(model)


def test_a_degree_that_does_not_divide_the_experts_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"qwen3_moe: .*moe_ep_degree=3 does not divide num_experts=8.*1, 2, 4, 8"):
        accel_moe.prepare(tiny_model(), moe_ep_degree=3)


def test_eager_is_refused_under_expert_parallelism():
    with pytest.raises(ValueError, match="moe_kernel=eager cannot skip the slots that belong to other ranks"):
        accel_moe.prepare(tiny_model(), moe_ep_degree=2, moe_kernel="eager")


def test_recomputing_the_up_projection_is_refused_where_another_kernel_keeps_it(monkeypatch):
    with pytest.raises(ValueError, match=r"moe_recompute_up_projection needs moe_kernel scattermoe.*run grouped_mm"):
        accel_moe.prepare(tiny_model(), moe_recompute_up_projection=True)
    monkeypatch.setattr(recognise, "triton_can_run", lambda: True)
    accel_moe.prepare(tiny_model(), moe_recompute_up_projection=True)


def test_auto_gives_an_unknown_gate_to_grouped_mm_and_scattermoe_refuses_it_by_name(monkeypatch):
    monkeypatch.setattr(recognise, "triton_can_run", lambda: True)
    model = tiny_model()
    model.model.layers[1].mlp.experts._apply_gate = lambda h: torch.sin(h.chunk(2, -1)[0])
    with pytest.raises(ValueError, match=r"layers\.1.*_apply_gate computes a gate that the kernels do not know.*auto"):
        accel_moe.prepare(model, moe_kernel="scattermoe")
    assert prepared_state(model) is None
    assert accel_moe.prepare(model)._accel_moe.kernel == "grouped_mm"


def test_recomputing_the_up_projection_keeps_less_for_backward(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kept = {}
    for recompute in (False, True):
        model = accel_moe.prepare(tiny_model(), moe_kernel="scattermoe", moe_recompute_up_projection=recompute)
        sizes: list[int] = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss, gradients = loss_and_gradients(model)
        kept[recompute] = sum(sizes), loss, gradients
        layers = [layer for _, layer in swapped_layers(model)]
        assert all(
            view_of(layer, layer._accel_moe_layer, torch.float32).hints.recompute_up == recompute for layer in layers
        )
    tokens, width = batches(1)[0].numel(), layers[0].gate_up_proj.shape[1]
    assert kept[False][0] - kept[True][0] == len(layers) * tokens * model.config.num_experts_per_tok * width
    assert torch.equal(kept[False][1], kept[True][1])
    assert all(torch.equal(g, kept[True][2][name]) for name, g in kept[False][2].items() if g is not None)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: setattr(m, "has_second_gate", True), "flag.*has_second_gate"),
        (lambda m: setattr(m, "has_post_expert_norm", True), "has_post_expert_norm"),
        (lambda m: setattr(m, "_is_expert_parallel", True), "transformers' own expert parallelism"),
        (lambda m: m.register_parameter("extra", nn.Parameter(torch.zeros(8, 1))), "parameter.*extra"),
        (lambda m: m.register_buffer("scale", torch.zeros(8)), "buffer.*scale.*quantised"),
    ],
)
def test_experts_that_are_not_understood_are_refused_by_name(change, reason):
    model = tiny_model()
    change(model.model.layers[1].mlp.experts)
    with pytest.raises(ValueError, match=rf"qwen3_moe: cannot prepare model.layers.1.mlp.experts .*{reason}"):
        accel_moe.prepare(model)


def test_a_refused_model_is_left_as_it_was():
    model = tiny_model()
    with pytest.raises(ValueError):
        accel_moe.prepare(model, moe_ep_degree=3)
    assert prepared_state(model) is None
    accel_moe.prepare(model)


def test_a_marked_layer_that_was_never_sharded_raises_in_its_forward():
    model = accel_moe.prepare(tiny_model(), moe_ep_degree=2)
    with pytest.raises(RuntimeError, match="moe_ep_degree=2 but its experts were never sharded"):
        model(input_ids=batches(1)[0])


class Alone:
    """A dispatcher of one rank; notes the work that it may overlap with its backward."""

    group = None

    def __init__(self):
        self.overlaps = []

    def dispatch(self, tokens, work):
        return Dispatched(*tokens, tokens.index.numel())

    def combine(self, rows, sent, work):
        self.overlaps.append(work.for_backward())
        return rows


@pytest.mark.parametrize("again", [False, True])
def test_weights_are_not_cast_beside_the_exchange_for_a_backward_that_runs_the_layer_again_first(again, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = accel_moe.prepare(tiny_model(), moe_ep_degree=2, moe_kernel="scattermoe").double()
    _, layer = next(swapped_layers(model))
    state = layer._accel_moe_layer
    state.dispatcher, state.compute_dtype = Alone(), torch.float32
    with kept_exchanges()[0] if again else contextlib.nullcontext():
        layer(torch.randn(3, 32), torch.tensor([[0, 1], [2, 3], [3, 0]]), torch.rand(3, 2))
    (overlap,) = state.dispatcher.overlaps
    assert (overlap is None) == again


def test_tokens_per_expert_counts_slots_since_the_last_call_under_its_older_name_too():
    assert accel_moe.expert_load is accel_moe.tokens_per_expert
    model = accel_moe.prepare(tiny_model())
    batch = batches(1)[0]
    model(input_ids=batch)
    model(input_ids=batch)
    load = accel_moe.expert_load(model)
    assert list(load) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert all(counts.shape == (8,) and counts.sum() == 2 * batch.numel() * 2 for counts in load.values())
    assert all(counts.sum() == 0 for counts in accel_moe.expert_load(model).values())


def test_expert_load_counts_a_checkpointed_forward_once():
    model = accel_moe.prepare(tiny_model())
    model.gradient_checkpointing_enable()
    model.train()
    batch = batches(1)[0]
    model(input_ids=batch, labels=batch).loss.backward()
    assert all(counts.sum() == batch.numel() * 2 for counts in accel_moe.expert_load(model).values())


def test_expert_load_of_an_unprepared_model_is_refused():
    with pytest.raises(ValueError, match="has not seen"):
        accel_moe.expert_load(tiny_model())


def test_autocast_decides_the_compute_dtype():
    model = accel_moe.prepare(tiny_model())
    seen = []
    layer = model.model.layers[0].mlp.experts
    original = experts_layer.experts_function

    def spy(kernel, module):
        def function(view, hidden, index, weights):
            seen.append((hidden.dtype, view.gate_up_proj.dtype))
            return original(kernel, module)(view, hidden, index, weights)

        return function

    experts_layer.experts_function = spy
    try:
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(torch.randn(3, 32), torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.rand(3, 2))
    finally:
        experts_layer.experts_function = original
    assert seen == [(torch.bfloat16, torch.bfloat16)] and out.dtype == torch.float32
