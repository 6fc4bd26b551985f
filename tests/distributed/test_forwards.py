"""A patched forward of the experts on several ranks: Liger's gives way, another is refused on every rank."""

import os
import types

import pytest
import torch

from tests.distributed.parity import Case, accelerator_for, build
from tests.distributed.trainer_parity import InOrder, trainer_arguments
from tests.ranks import run_ranks
from tests.unit.test_forwards import as_liger_does, foreign, liger_config


def on_ranks(case: Case) -> tuple[float, float, str]:
    """Losses without and with Liger's patch, and what another one meets."""
    import accel_moe
    import accel_moe.cpu
    from tests.tiny import batches

    accel_moe.cpu.enable()
    losses, accelerator = [], None
    for patched in (False, True):
        model = accel_moe.prepare(build(case), moe_ep_degree=case.ep)
        if patched:
            as_liger_does(model)
        accelerator = accelerator or accelerator_for(case, model)
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        own = batches(1)[0].chunk(case.world)[accelerator.process_index]
        losses.append(model(input_ids=own, labels=own).loss.item())
        accelerator.free_memory()
    model = accel_moe.prepare(build(case), moe_ep_degree=case.ep)
    if os.environ["RANK"] == "1":
        layer = model.model.layers[0].mlp.experts
        layer.forward = types.MethodType(foreign, layer)
    with pytest.raises(ValueError) as error:
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return *losses, str(error.value)


def test_experts_over_ranks_stay_ours_and_another_forward_on_one_rank_is_refused_on_all():
    for plain, patched, message in run_ranks(on_ranks, 2, Case(2, 2)):
        assert plain == patched
        assert "model.layers.0.mlp.experts" in message and "foreign was put in its place" in message


def with_trainer(case: Case, folder: str) -> list[list[float]]:
    from transformers import Trainer

    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    losses = []
    for liger in (False, True):
        model = build(case)
        arguments = trainer_arguments(case, folder, model)
        arguments.use_liger_kernel, arguments.liger_kernel_config = liger, liger_config()
        trainer = Trainer(
            model=accel_moe.prepare(model, moe_ep_degree=case.ep), args=arguments, train_dataset=InOrder()
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    return losses


@pytest.mark.parametrize("ep", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_trainer_with_use_liger_kernel_trains_our_experts(ep, tmp_path):
    pytest.importorskip("liger_kernel")
    for plain, liger in run_ranks(with_trainer, 2, Case(2, ep), str(tmp_path)):
        assert plain == liger and len(plain) == 3
