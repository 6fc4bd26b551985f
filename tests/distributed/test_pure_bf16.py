"""bf16 without mixed precision, with routers in fp32 (transformers 5.24 keeps them so): loss, gradients and norm of
one process.

One layer with experts, in bf16: sums in another order differ by bf16's rounding, 2^-8 of a value. 3 percent of the
largest gradient is twice what was measured; a factor of the ranks, or a router that was left out, is larger.
"""

import pytest
import torch

from tests.distributed.loading import Load
from tests.distributed.parity import Case, accelerator_for, build, clean, whole
from tests.ranks import run_ranks
from tests.tiny import batches, decoder_layer_names

CASES = (Case(2, 1, family="deepseek_v3"), Case(2, 2, family="deepseek_v3"))
MORE = (
    Case(2, 2, family="deepseek_v3", ram_efficient=True),
    Case(2, 2, family="glm4_moe", checkpointing=True, tie=True),
)


def mixed(model):
    model.bfloat16()
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.float()
            # accelerate's RAM-efficient loading fails for buffers in the state dict, with any model
            module.register_buffer("e_score_correction_bias", module.e_score_correction_bias, persistent=False)
    return model


def on_one_process(case: Case):
    model = mixed(build(case))
    model.set_experts_implementation("eager")
    loss = model(input_ids=batches(1)[0], labels=batches(1)[0]).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.item(), gradients, float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))


def step(accelerator, case: Case, model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {clean(n): p.dtype for n, p in model.named_parameters()}
    model, optimizer = accelerator.prepare(model, optimizer)
    own = batches(1)[0].chunk(case.world)[accelerator.process_index].to(accelerator.device)
    loss = model(input_ids=own, labels=own).loss
    accelerator.backward(loss)
    gradients = {clean(n): whole(p.grad) for n, p in model.named_parameters()}
    norm = float(whole(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
    optimizer.step()
    assert {clean(n): p.dtype for n, p in model.named_parameters()} == before
    return accelerator.reduce(loss.detach().float(), "mean").item(), gradients, norm


def on_ranks(cases, folder: str = ""):
    import accel_moe
    import accel_moe.cpu
    from tests.distributed.loading import load

    accel_moe.cpu.enable()
    accelerator, found = None, []
    for case in cases:
        if folder:
            model = load(case, Load(dtype="float32", prepare=False), folder, ours=True).bfloat16()
            model.model.layers[1].mlp.gate.float()
        else:
            model = mixed(build(case))
        accel_moe.prepare(model, moe_ep_degree=case.ep)
        accelerator = accelerator or accelerator_for(case, model)
        plugin = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = decoder_layer_names(model)
        plugin.cpu_ram_efficient_loading, plugin.activation_checkpointing = case.ram_efficient, case.checkpointing
        found.append(step(accelerator, case, model))
        accelerator.free_memory()
    return found


def check(case: Case, found) -> None:
    loss, gradients, norm = found
    expected_loss, expected, expected_norm = on_one_process(case)
    assert {g.dtype for g in gradients.values()} == {torch.float32, torch.bfloat16}
    assert abs(loss - expected_loss) < 0.01 and abs(norm - expected_norm) < 0.01 * expected_norm
    for name, gradient in expected.items():
        assert gradients[name].dtype == gradient.dtype, name
        gap = (gradients[name].float() - gradient.float()).abs().max().item()
        assert gap <= 0.03 * gradient.abs().max().item() + 1e-5, (name, gap)


def test_a_step_of_a_bf16_model_with_fp32_routers_equals_that_of_one_process():
    for case, found in zip(CASES, run_ranks(on_ranks, 2, CASES)[0]):
        check(case, found)


@pytest.mark.slow
def test_the_same_with_values_from_rank_0_and_with_activation_checkpointing():
    for case, found in zip(MORE, run_ranks(on_ranks, 2, MORE)[0]):
        check(case, found)


def test_such_a_model_can_be_read_into_its_shards(tmp_path):
    case = CASES[1]
    build(case).save_pretrained(tmp_path)
    check(case, run_ranks(on_ranks, 2, [case], str(tmp_path))[0][0])


def test_parameters_that_no_unit_can_hold_are_refused_on_every_rank():
    for message in run_ranks(refused, 2, Case(2, 2, family="deepseek_v3")):
        assert "mlp.gate (DeepseekV3TopkRouter) has trained parameters of bfloat16 and float32" in message


def refused(case: Case) -> str:
    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = mixed(build(case))
    model.model.layers[1].mlp.gate.bias = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    accel_moe.prepare(model, moe_ep_degree=case.ep)
    accelerator = accelerator_for(case, model)
    with pytest.raises(ValueError) as error:
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return str(error.value)
