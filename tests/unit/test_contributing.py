"""CONTRIBUTING.md shows how to add a dispatcher from outside. Its code, taken from the page, trains a step on ranks."""

import re
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import batches, decoder_layer_names, tiny_model

CONTRIBUTING = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
NAME = "every_token_everywhere"


def code_of_the_page() -> str:
    shown = CONTRIBUTING.read_text().split("<!-- dispatcher:begin -->")[1].split("<!-- dispatcher:end -->")[0]
    return re.fullmatch(r"\s*```python\n(.*)```\s*", shown, re.DOTALL)[1]


def train_a_step(dispatcher: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """(loss, gradient norm, {name: whole gradient}) of a tiny model's step at ep 2, on this rank."""
    exec(compile(code_of_the_page(), str(CONTRIBUTING), "exec"), {"__name__": "my_dispatcher"})
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = tiny_model()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=decoder_layer_names(model),
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    model = accel_moe.prepare(model, moe_ep_degree=2, moe_dispatcher=dispatcher)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    # the ranks bring different numbers of tokens
    first, rest = batches(1)[0].split([3, 5])
    tokens = (first, rest)[accelerator.process_index].to(accelerator.device)
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    gradients = {name: p.grad.full_tensor().cpu() for name, p in model.named_parameters()}
    norm = float(accelerator.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    return loss.item(), norm, gradients


@pytest.mark.core
def test_the_dispatcher_of_contributing_trains_a_step_as_auto_does():
    ours, theirs = run_ranks(train_a_step, 2, "auto"), run_ranks(train_a_step, 2, NAME)
    for (loss, norm, gradients), (shown_loss, shown_norm, shown_gradients) in zip(ours, theirs):
        # fp32 sums over ranks in another order
        assert shown_loss == pytest.approx(loss, rel=1e-6)
        assert shown_norm == pytest.approx(norm, rel=1e-5)
        torch.testing.assert_close(shown_gradients, gradients, rtol=1e-5, atol=1e-6)


def test_a_dispatcher_that_nobody_registered_is_refused_by_name():
    import accel_moe

    with pytest.raises(ValueError, match=r"moe_dispatcher='nobodys' is not registered\. Use one of .*auto"):
        accel_moe.prepare(tiny_model(), moe_dispatcher="nobodys")
