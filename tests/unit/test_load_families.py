"""Every family's checkpoint, read into shards without ranks: the rows of each of four, against plain from_pretrained.

Everything is compared at 0.0: the same bytes are read and cast once, on both methods.
"""

import re
from pathlib import Path

import pytest
import torch

from accel_moe import hooks
from accel_moe.experts.packing import Packing
from accel_moe.weights import fill, request
from accel_moe.weights.place import Place, own_rows
from accel_moe.weights.plan import pending
from accel_moe.weights.safetensors import read_header
from tests.families import tiny_families

FAMILIES = [source.name for source in tiny_families.families()]
RANKS = 4


def planned(model_class, folder, **options):
    with request.quiet_but_rank_0(), hooks.planning_loads():
        return model_class.from_pretrained(folder, **options)


def named(model):
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def stored_bytes(folder):
    """Of all tensors in the files, which may hold more than the model does (inkling2's padded vocabulary)."""
    return sum(t.size_bytes for file in Path(folder).glob("*.safetensors") for t in read_header(file).values())


def rows_of_rank(tensor, rank, ranks=RANKS):
    return own_rows(tensor.shape[0], [torch.distributed.tensor.Shard(0)], [ranks], [rank])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(class, folder, the model that plain from_pretrained makes of it, a planned one that is never filled)"""
    try:
        tiny = tiny_families.tiny(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    folder = str(tmp_path_factory.mktemp(request.param))
    tiny.build().save_pretrained(folder, max_shard_size="40KB")
    plain = tiny.model_class.from_pretrained(folder, dtype="float32")
    return tiny.model_class, folder, plain, planned(tiny.model_class, folder, dtype="float32")


def test_a_planned_model_filled_whole_is_the_plain_one(family):
    model_class, folder, plain, _ = family
    model = planned(model_class, folder, dtype="float32")
    report = fill.fill(model, torch.device("cpu"))
    ours, expected = named(model), named(plain)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
        assert ours[name].requires_grad == tensor.requires_grad, name
    ties = {(a, b) for a in expected for b in expected if expected[a] is expected[b]}
    assert ties == {(a, b) for a in ours for b in ours if ours[a] is ours[b]}
    assert repr(model._weight_conversions) == repr(plain._weight_conversions), "save_pretrained would write other keys"
    assert report.read_bytes <= stored_bytes(folder), "something was read twice"


def test_each_rank_s_rows_are_the_plain_model_s(family):
    *_, plain, model = family
    plan, expected = pending(model).plan, named(plain)
    for rank in range(RANKS):
        places = {}
        for name in plan.dtypes:
            whole = expected[name]
            first, count = rows_of_rank(whole, rank) if whole.dim() else (0, 1)
            shape = (count, *whole.shape[1:]) if whole.dim() else ()
            places[name] = Place(torch.full(shape, float("nan")).to(whole.dtype), first, count)
        fill.read_into(places, plan, model)
        for name, place in places.items():
            rows = expected[name].detach()
            rows = rows[place.first : place.first + place.count] if rows.dim() else rows
            assert torch.equal(place.local, rows), (rank, name)


def test_packed_experts_are_the_plain_model_s_packed(family):
    *_, plain, model = family
    plan, expected = pending(model).plan, named(plain)
    stacks = [name for name in plan.dtypes if re.search(r"\.experts\.(gate_up_proj|up_proj|down_proj)$", name)]
    places = {}
    for name in stacks:
        first, count = rows_of_rank(expected[name], 1)
        how = Packing("int8", expected[name].shape[1:], torch.float32)
        places[name] = Place(torch.zeros((count, how.row_bytes), dtype=torch.uint8), first, count, packing=how)
    fill.read_into(places, plan, model)
    for name, place in places.items():
        rows = expected[name].detach()[place.first : place.first + place.count]
        assert torch.equal(place.local, torch.stack([place.packing.pack(row) for row in rows])), name


def test_experts_are_read_by_the_rows_a_rank_owns(family):
    model_class, *_, model = family
    plan = pending(model).plan
    methods = {name: group.method for group in plan.groups for name in group.targets if ".experts." in name}
    whole = {name for name, method in methods.items() if method == "whole"}
    assert not whole, f"{model_class.__name__} reads whole layers of experts: {sorted(whole)[:2]}"
