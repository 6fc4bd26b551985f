"""Casts that are made before a layer asks for them change no bit, and outlive no forward and no backward.

Weights are stored in fp64 here and computed with in fp32, for Triton's interpreter has no bf16.
"""

import pytest
import torch

from tests.distributed.parity import Case, build, clean, optimizer_of, whole
from tests.ranks import run_ranks
from tests.tiny import batches, decoder_layer_names

CASE = Case(2, 2, layers=3, interpret=True)


def train(case: Case, ahead: bool, between: str = "") -> tuple[dict, list[int]]:
    """The weights after two steps, and how many casts came from ahead in each of them."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    import accel_moe
    import accel_moe.cpu
    from accel_moe.experts import early_casts
    from accel_moe.kernels.casts import Casts

    accel_moe.cpu.enable()
    counted = [0]
    aside, take = Casts.prepare_aside, Casts.take
    if not ahead:
        Casts.prepare_aside = lambda self: None
    Casts.take = lambda self: (counted.__setitem__(-1, counted[-1] + (self._aside is not None)), take(self))[1]
    model = build(case).double()
    accel_moe.prepare(model, moe_ep_degree=case.ep, moe_kernel="scattermoe")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=decoder_layer_names(model),
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32),
        activation_checkpointing=case.checkpointing,
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    model, optimizer = accelerator.prepare(model, optimizer_of(model, case))
    layers = [m for n, m in model.named_modules() if n.endswith(".experts")]
    for step, batch in enumerate(batches(2)):
        counted.append(0)
        own = batch.chunk(case.world)[accelerator.process_index].to(accelerator.device)
        if between == "a forward that breaks off" and step:
            break_off(model, own, layers[1])
        if between == "evaluation" and step:
            with torch.no_grad():
                model(input_ids=own)
        accelerator.backward(model(input_ids=own, labels=own).loss)
        optimizer.step()
        optimizer.zero_grad()
    Casts.prepare_aside, Casts.take = aside, take
    assert early_casts._ahead is None  # none outlives its forward
    return {clean(n): whole(p.detach()) for n, p in model.named_parameters()}, counted[1:]


def break_off(model, batch, layer) -> None:
    """After the first layer has made the casts of the second. Then the weights change."""
    from accel_moe.experts import early_casts

    def refuse(*_):
        raise InterruptedError

    hook = layer.register_forward_pre_hook(refuse)
    with pytest.raises(InterruptedError), torch.no_grad():
        model(input_ids=batch)
    hook.remove()
    assert early_casts._ahead is None
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)


@pytest.mark.parametrize(
    "between",
    [
        pytest.param("", marks=pytest.mark.slow),
        pytest.param("evaluation", marks=pytest.mark.slow),
        "a forward that breaks off",
    ],
)
def test_the_weights_are_to_the_bit_what_they_are_without(between):
    plain, none = run_ranks(train, 2, CASE, False, between, interpret=True)[0]
    ours, taken = run_ranks(train, 2, CASE, True, between, interpret=True)[0]
    assert sum(none) == 0
    # the second and third layers' in forward, once the order is known; the first and second layers' in backward
    assert taken[1] == 4 + 2 * (between == "evaluation")
    for name, weight in plain.items():
        assert torch.equal(ours[name], weight), name


@pytest.mark.slow
def test_nothing_is_made_ahead_of_a_backward_that_runs_forwards_again():
    case = Case(2, 2, layers=3, checkpointing=True, interpret=True)
    plain, _ = run_ranks(train, 2, case, False, interpret=True)[0]
    ours, taken = run_ranks(train, 2, case, True, interpret=True)[0]
    assert taken[1] == 2  # in forward alone
    for name, weight in plain.items():
        assert torch.equal(ours[name], weight), name
