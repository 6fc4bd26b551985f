"""Edits of a deferred model on several ranks: the same shards and the same step as after plain from_pretrained."""

import os
import re

import pytest
import torch

from tests.distributed.loading import Load, differences, follow, load
from tests.distributed.parity import Case, accelerator_for
from tests.distributed.test_load import save
from tests.ranks import run_ranks
from tests.unit import test_load_edits as edits

EDITS = (edits.new_head, edits.swapped_layers, edits.dropped_first_layer)
MORE = (
    edits.replaced_layer,
    edits.copied_layer,
    edits.tied_by_hand,
    edits.assigned_data,
    edits.loaded_by_assignment,
    edits.cast_there_and_back,
)


def after_edits(case: Case, folder: str, some) -> list[str]:
    """The differences on this rank."""
    import accel_moe.cpu

    accel_moe.cpu.enable()
    wrong, how = [], Load()
    accelerator = None
    for edit in some:
        roads = []
        for ours in (True, False):
            model = load(case, how, folder, ours)
            with torch.no_grad():
                edit(model)
            accelerator = accelerator or accelerator_for(case, model)
            roads.append(follow(accelerator, model, case, how))
            accelerator.free_memory()
        wrong += [f"{edit.__name__}: {line}" for line in differences(*roads)]
    return wrong


def check(case: Case, folder, some) -> None:
    for rank, wrong in enumerate(run_ranks(after_edits, case.world, case, save(case, folder), some)):
        assert not wrong, f"rank {rank}: " + "\n".join(wrong[:8])


def test_shards_and_a_step_after_an_edit_equal_those_of_plain_from_pretrained(tmp_path):
    check(Case(2, 2), tmp_path, EDITS)


CASES = [Case(2, 2), Case(2, 1), Case(2, 2, ram_efficient=True), Case(2, 1, checkpointing=True, tie=True)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_after_every_edit_in_every_layout(case, tmp_path):
    # plain accelerate unties what a user tied, when it loads on rank 0 alone
    check(case, tmp_path, [e for e in EDITS + MORE if not (case.ram_efficient and e is edits.tied_by_hand)])


def edited_on_one_rank(case: Case, folder: str, edit) -> str:
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = load(case, Load(), folder, ours=True)
    if os.environ["RANK"] == "1":
        edit(model)
    accelerator = accelerator_for(case, model)
    with pytest.raises(ValueError) as error:
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return str(error.value)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            edits.new_head,
            r"edited differently on ranks 0 and 1.*the values of lm_head\.weight, rank 1 has lm_head.* real",
        ),
        (edits.zeroed_data, r"lm_head\.weight was changed in place"),
        (edits.dropped_first_layer, r"The model differs between ranks: .*layers\.1\..* on rank 0, absent on rank 1"),
    ],
    ids=["new head", "in place", "dropped layer"],
)
def test_an_edit_on_one_rank_is_refused_on_all(edit, says, tmp_path):
    case = Case(2, 2)
    for message in run_ranks(edited_on_one_rank, 2, case, save(case, tmp_path), edit):
        assert re.search(says, message), message


def head_with_a_seed_of_its_own(case: Case, folder: str) -> list[float]:
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = load(case, Load(), folder, ours=True)
    torch.manual_seed(int(os.environ["RANK"]))
    model.lm_head = torch.nn.Linear(32, 64, bias=False)
    accelerator = accelerator_for(case, model)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return model.lm_head.weight.full_tensor().flatten().tolist()


def test_a_head_that_the_user_put_in_is_rank_0_s_though_seeds_differ(tmp_path):
    case = Case(2, 2)
    first, second = run_ranks(head_with_a_seed_of_its_own, 2, case, save(case, tmp_path))
    torch.manual_seed(0)
    assert first == second == torch.nn.Linear(32, 64, bias=False).weight.flatten().tolist()
