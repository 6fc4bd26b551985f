"""LoRA through PEFT: on attention and router with frozen experts, and on the experts themselves.

The oracle is stock PEFT on one process, the model's own loop, the whole batch. Tolerance, float32: 1e-4 of each
tensor's largest value, as in the parity table (sums over ranks in another order); weights after two SGD steps alike.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

import accel_moe
from accel_moe.experts import layer as experts_layer
from tests.families.peft_runs import (
    EXPERTS,
    Case,
    base_of,
    build,
    differences,
    on_one_process,
    on_rank,
    randomise_adapter,
    wrapped_after_sharding,
)
from tests.ranks import run_ranks
from tests.tiny import batches, tiny_model

pytest.importorskip("peft")

ROUTER = ("mlp.gate.weight",)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
TABLE = [
    Case(2, 1),
    Case(2, 2),
    Case(2, 2, parameters=ROUTER),
    Case(2, 1, modules=(), parameters=EXPERTS),
    slow(Case(2, 2, modules=(), parameters=EXPERTS)),  # as below, where PEFT wraps a model that is prepared
    Case(4, 2, parameters=(*ROUTER, *EXPERTS), rslora=True),
    Case(2, 2, modules=(), parameters=EXPERTS[1:], r=2, alpha=5),
    Case(2, 2, modules=("q_proj",), parameters=EXPERTS, checkpointing=True),
    Case(2, 2, modules=(), parameters=EXPERTS, prepared_first=True),
    slow(Case(2, 2, parameters=EXPERTS, compiled="aot_eager")),
    slow(Case(2, 2, parameters=EXPERTS, compiled="inductor")),  # which looks at strides, too
]

Fused = functools.partial(Case, kernel="scattermoe", interpret=True, modules=(), parameters=EXPERTS)
"""The kernels compute with the factors (kernels/low_rank.py)."""
FUSED = [
    slow(Fused(2, 1, r=1)),
    slow(Fused(2, 2, modules=("q_proj",), parameters=(*ROUTER, *EXPERTS), checkpointing=True)),
    slow(Fused(2, 2)),  # test_quantised.py has an ordinary row of these kernels on two ranks, over a packed base
    slow(Fused(4, 2, dp_replicate=2, r=16, rslora=True)),
    slow(Fused(4, 4, r=20, parameters=EXPERTS[1:])),
    slow(Fused(2, 2, adapters=2, compiled="aot_eager")),
    slow(Fused(2, 2, adapters=2, options=(("moe_dispatch_chunk_tokens", 8),))),
    slow(Fused(2, 2, family="gpt_oss", options=(("moe_recompute_up_projection", True),))),
    slow(Fused(2, 2, family="nemotron_h", parameters=("experts.up_proj", "experts.down_proj"))),
    slow(Fused(2, 2, family="deepseek_v4")),
    slow(Fused(2, 2, adapters=2, r=1)),
    slow(Fused(2, 2, r=16)),
    slow(Fused(4, 2, r=20)),
    slow(Fused(2, 1, family="gpt_oss")),
    slow(Fused(2, 1, checkpointing=True)),
]


@functools.cache
def oracle(case: Case):
    return on_one_process(
        replace(
            case,
            world=1,
            ep=1,
            kernel="eager",
            interpret=False,
            checkpointing=False,
            prepared_first=False,
            dp_replicate=1,
            options=(),
        )
    )


@functools.cache
def loss_of_the_base(family: str) -> float:
    batch = batches(1)[0]
    return base_of(family)(input_ids=batch, labels=batch).loss.item()


@pytest.mark.parametrize("case", TABLE + FUSED, ids=lambda case: getattr(case, "name", None))
def test_lora_training_equals_stock_peft_on_one_process(case):
    run = run_ranks(on_rank, case.world, case, interpret=case.interpret)[0]
    assert not (wrong := differences(run, oracle(case))), "\n".join(wrong)
    assert run.facts["frozen_with_gradient"] == []
    assert run.facts["optimizer_state"] == run.facts["trained"] > 0
    assert run.facts["loss_without_adapter"] == pytest.approx(loss_of_the_base(case.family), rel=1e-5)
    separate, merged, unmerged = run.facts["losses_around_merging"]
    # a merged weight is rounded once more, each product is not: fp32 noise
    assert (merged, unmerged) == pytest.approx((separate, separate), rel=1e-5)
    assert separate != pytest.approx(run.facts["loss_without_adapter"], rel=1e-4)


def test_peft_may_wrap_experts_that_are_already_sharded():
    from peft import LoraConfig, get_peft_model

    stock = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=[], target_parameters=list(EXPERTS)))
    randomise_adapter(stock)
    batch = batches(1)[0]
    right = stock(input_ids=batch, labels=batch).loss.item()
    assert run_ranks(wrapped_after_sharding, 2) == pytest.approx([right] * 2, rel=1e-5)


def test_frozen_experts_stay_in_bf16_under_mixed_precision():
    case = Case(2, 2, mixed_precision="bf16")
    run = run_ranks(on_rank, 2, case)[0]
    assert run.facts["frozen_dtypes"] == ["torch.bfloat16"]
    assert run.facts["trained_dtypes"] == ["torch.float32"]
    # bf16 has 8 bits of mantissa, and the base is rounded to it too: the loss agrees to 2 %, no more can be asked
    assert abs(run.losses[0] - oracle(Case()).losses[0]) <= 0.02 * oracle(Case()).losses[0]


@pytest.mark.parametrize(
    ("parameters", "kernel"),
    [
        pytest.param(
            parameters,
            kernel,
            # the interpreter is slow, and as in the attention's row the experts have no adapter
            marks=[pytest.mark.slow] if (name, kernel) == ("router", "scattermoe") else [],
            id=f"{name}-{kernel}",
        )
        for name, parameters in {"attention": (), "router": ROUTER, "experts": EXPERTS}.items()
        for kernel in ("grouped_mm", "eager", "scattermoe")
    ],
)
def test_lora_in_one_process_equals_stock_peft(parameters, kernel):
    if kernel == "scattermoe" and torch.cuda.is_available():
        pytest.skip("a model on the CPU needs the interpreter")
    case = Case(1, 1, parameters=parameters, kernel=kernel)
    model, stock = build(case), build(case)
    stock.base_model.model.set_experts_implementation("eager")
    accel_moe.prepare(model, moe_kernel=kernel)
    batch = batches(1)[0]
    for m in (model, stock):
        m(input_ids=batch, labels=batch).loss.backward()
    for (name, ours), (_, right) in zip(model.named_parameters(), stock.named_parameters()):
        assert (ours.grad is None) == (right.grad is None), name
        if right.grad is not None:  # another order of summation
            torch.testing.assert_close(ours.grad, right.grad, rtol=0, atol=1e-4 * right.grad.abs().max().item())


def test_frozen_experts_ask_the_experts_function_for_no_weight_gradient(monkeypatch):
    asked = []
    original = experts_layer.experts_function

    def watching(kernel, module):
        function = original(kernel, module)

        def watched(view, *inputs):
            asked.append((view.gate_up_proj.requires_grad, view.down_proj.requires_grad))
            return function(view, *inputs)

        return watched

    monkeypatch.setattr(experts_layer, "experts_function", watching)
    model = accel_moe.prepare(build(Case(1, 1)), moe_kernel="grouped_mm")
    batch = batches(1)[0]
    model(input_ids=batch, labels=batch).loss.backward()
    assert asked == [(False, False)] * 2


def widths_exchanged(parameters: tuple[str, ...], dispatcher: str) -> tuple[list[int], list[int]]:
    """On a rank: the bytes of a row in each exchange of the forward, and of the backward, of one step in which only
    `parameters` train."""
    import accel_moe.cpu
    from tests.distributed.exchange_runs import watched_exchanges
    from tests.distributed.parity import Case as Plain
    from tests.distributed.parity import accelerator_for

    accel_moe.cpu.enable()
    model = tiny_model("qwen3_moe")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in parameters)
    accel_moe.prepare(model, moe_ep_degree=2, moe_dispatcher=dispatcher)
    accelerator = accelerator_for(Plain(2, 2), model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    own = batches(1)[0].chunk(2)[accelerator.process_index]
    with watched_exchanges() as widths:
        loss = model(input_ids=own, labels=own).loss
        forward = len(widths)
        accelerator.backward(loss)
    return widths[:forward], widths[forward:]


ROW, WITH_WEIGHTS, PADDED, WEIGHTS = 4 * 32, 4 * 32 + 64, 64, 8
"""Bytes: 32 fp32 values; with two weights (and two expert numbers), padded to 64; and two weights alone, padded where
rows could be with them, and not."""


@pytest.mark.parametrize(
    ("trained", "to_all", "to_every_rank"),
    [
        # 2 layers; a forward sends rows out and brings them home; each has its backward where it is needed
        slow("lm_head.weight", [], []),
        # layer 1; from its experts only the weights' gradients
        ("model.layers.1.mlp.gate.weight", [ROW, PADDED], [ROW, WEIGHTS]),
        ("model.layers.1.self_attn.q_proj.weight", [ROW, WITH_WEIGHTS], [ROW, WEIGHTS, ROW]),
        slow("model.embed_tokens.weight", [ROW, WITH_WEIGHTS] * 2, [ROW, WEIGHTS, ROW] * 2),  # the same in layer 0
    ],
)
def test_no_gradient_passes_through_the_exchange_that_nobody_needs(trained, to_all, to_every_rank):
    forward = [WITH_WEIGHTS, ROW] * 2
    assert run_ranks(widths_exchanged, 2, (trained,), "all_to_all") == [(forward, to_all)] * 2
    assert run_ranks(widths_exchanged, 2, (trained,), "all_gather") == [(forward, to_every_rank)] * 2


@pytest.mark.parametrize("parameters", [(), EXPERTS], ids=["attention", "experts"])
def test_stock_peft_loads_the_adapter_that_two_ranks_trained(parameters, tmp_path):
    from peft import PeftModel

    case = Case(2, 2, parameters=parameters)
    run = run_ranks(on_rank, 2, case, str(tmp_path))[0]
    base = tiny_model(case.family)
    base.set_experts_implementation("eager")
    loaded = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)
    assert loaded.peft_config["default"].lora_alpha == case.alpha
    found = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
    assert found.keys() == run.weights.keys()
    for name, weight in run.weights.items():
        torch.testing.assert_close(found[name].detach(), weight, rtol=0, atol=0)
    # and it computes what the oracle computes with its own trained adapter
    trained = build(case)
    trained.load_state_dict(oracle(case).weights, strict=False)
    trained.base_model.model.set_experts_implementation("eager")
    batch = batches(1, seed=9)[0]
    with torch.no_grad():
        ours, right = loaded(input_ids=batch).logits, trained(input_ids=batch).logits
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-4 * right.abs().max().item())


def test_dropout_on_experts_is_refused_by_peft_and_on_attention_is_applied():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="lora_dropout != 0"):
        get_peft_model(tiny_model(), LoraConfig(target_modules=[], target_parameters=list(EXPERTS), lora_dropout=0.1))
    config = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    outputs = []
    for own in (False, True):
        model = get_peft_model(tiny_model(), config)
        randomise_adapter(model)
        model.base_model.model.set_experts_implementation("eager")
        if own:
            accel_moe.prepare(model, moe_kernel="grouped_mm")
        torch.manual_seed(2)
        outputs.append(model.train()(input_ids=batches(1)[0]).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-4 * outputs[0].abs().max().item())


def test_lora_on_an_experts_bias_is_refused_over_several_ranks():
    from peft import LoraConfig, get_peft_model

    from tests.families import tiny_families

    model = tiny_families.tiny("gpt_oss").build()
    config = LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj_bias"])
    with pytest.raises(ValueError, match="LoRA on down_proj_bias, which is not a stack of matrices"):
        accel_moe.prepare(get_peft_model(model, config), moe_ep_degree=2)


def test_a_second_prepare_of_a_peft_model_changes_nothing():
    model = build(Case(1, 1, parameters=EXPERTS))
    accel_moe.prepare(model)
    classes = [type(m) for m in model.modules()]
    assert accel_moe.prepare(model) is model
    assert [type(m) for m in model.modules()] == classes
