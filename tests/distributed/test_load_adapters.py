"""LoRA on accel_moe.from_pretrained over ranks: the shards and the step of a model that every rank loaded whole."""

from __future__ import annotations

import pytest
import torch

from tests.adapters import EXPERTS, wrap
from tests.distributed import loading
from tests.distributed.loading import Load, differences
from tests.distributed.parity import Case, accelerator_for, clean
from tests.distributed.test_load import save
from tests.ranks import run_ranks
from tests.tiny import tiny_model

pytest.importorskip("peft")
LORA = dict(r=4, target_modules=["q_proj", "v_proj"], target_parameters=[*EXPERTS, "mlp.gate.weight"])
ORDERS = ("peft first", "prepare first", "trained")


def wrapped(case: Case, folder: str, ours: bool, order: str, how: Load):
    """A PEFT model of the checkpoint in `folder`; "trained": with the adapter in folder/adapter."""
    from peft import LoraConfig, PeftModel, get_peft_model

    import accel_moe

    model = loading.load(case, Load(prepare=False, dtype=how.dtype), folder, ours)
    torch.manual_seed(11)
    if order == "prepare first":
        return get_peft_model(accel_moe.prepare(model, moe_ep_degree=case.ep), LoraConfig(**LORA))
    if order == "trained":
        model = PeftModel.from_pretrained(model, f"{folder}/adapter", is_trainable=True)
    else:
        model = get_peft_model(model, LoraConfig(**LORA, modules_to_save=["lm_head"]))
    return accel_moe.prepare(model, moe_ep_degree=case.ep)


def follow(accelerator, model, how: Load) -> loading.Road:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    names = {id(p): clean(n) for n, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    loaded = loading.values(model)
    loss = loading.one_step(accelerator, model, optimizer, how)
    return loading.Road(loaded, loss, loading.values(model), groups, set())


def compare(case: Case, folder: str, order: str, how: Load) -> list[str]:
    """The differences on this rank. A collective."""
    import os

    import accel_moe.cpu

    accel_moe.cpu.enable()
    os.environ["ACCELERATE_MIXED_PRECISION"] = how.mixed_precision
    accelerator = accelerator_for(case, tiny_model(case.family))
    roads = []
    for ours in (True, False):
        model = wrapped(case, folder, ours, order, how)
        assert ours == any(p.is_meta for p in model.parameters())
        roads.append(follow(accelerator, model, how))
        accelerator.free_memory()
    return differences(*roads)


def rows():
    """Each order on ep 2; of the other layouts one order each, and the rest of the product is slow."""
    layouts = {
        "w2 ep2": (Case(2, 2), Load(), ORDERS),
        "w4 ep2": (Case(4, 2), Load(), ["peft first"]),
        "w2 ep1": (Case(2, 1), Load(), ["trained"]),
        "bf16": (Case(2, 2), Load(dtype="bfloat16", mixed_precision="bf16"), ["peft first"]),
    }
    for name, (case, how, fast) in layouts.items():
        for order in ORDERS:
            marks = [] if order in fast else [pytest.mark.slow]
            marks += [pytest.mark.core] if (name, order) == ("w2 ep2", "peft first") else []
            yield pytest.param(case, how, order, marks=marks, id=f"{name} {order}")


@pytest.mark.parametrize(("case", "how", "order"), list(rows()))
def test_shards_and_a_step_equal_those_of_a_base_loaded_whole(case, how, order, tmp_path):
    folder = save(case, tmp_path)
    wrap(tiny_model(case.family), **LORA).save_pretrained(tmp_path / "adapter")
    for rank, wrong in enumerate(run_ranks(compare, case.world, case, folder, order, how)):
        assert not wrong, f"rank {rank}: " + "\n".join(wrong[:8])


def seeds_that_differ(case: Case, folder: str) -> dict[str, torch.Tensor]:
    import os

    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    from peft import LoraConfig, get_peft_model

    model = accel_moe.from_pretrained(folder, dtype="float32")
    torch.manual_seed(int(os.environ["RANK"]))
    model = accel_moe.prepare(get_peft_model(model, LoraConfig(**LORA)), moe_ep_degree=case.ep)
    accelerator = accelerator_for(case, model.base_model.model)
    model, _ = accelerator.prepare(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    return {n: p.full_tensor().detach() for n, p in model.named_parameters() if "lora_A" in n}


def test_every_rank_gets_the_adapter_of_rank_0_though_seeds_differ(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    case = Case(2, 2)
    first, second = run_ranks(seeds_that_differ, 2, case, save(case, tmp_path))
    assert first and all(torch.equal(second[name], value) for name, value in first.items())
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)
    torch.manual_seed(0)
    right = dict(get_peft_model(plain, LoraConfig(**LORA)).named_parameters())
    assert all(torch.equal(value, right[name].detach()) for name, value in first.items())
