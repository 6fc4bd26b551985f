"""Sorting slots by expert and cutting rows into tiles, against torch.sort, in Triton's interpreter."""

import pytest
import torch

from accel_moe.kernels import routing as routing_module
from accel_moe.kernels import sort
from accel_moe.kernels.launch import TileLists
from accel_moe.kernels.launch_passes import add_counts
from accel_moe.kernels.routing import list_tiles, sort_and_tile, sort_slots
from tests.kernels import count_launches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted: see tests/gpu")


def routed(T, K, E, sentinels=0.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    index = torch.randint(0, E, (T, K), generator=gen)
    return index.masked_fill(torch.rand(T, K, generator=gen) < sentinels, E)


@pytest.mark.parametrize(
    ("T", "K", "E", "sentinels"),
    [(1, 1, 1, 0), (50, 3, 7, 0), (50, 3, 7, 0.5), (700, 4, 300, 0.2), (9000, 2, 5, 0.1)],
)
def test_rows_are_slots_in_stable_expert_order(T, K, E, sentinels):
    index = routed(T, K, E, sentinels)
    routing = sort_slots(index, E, T * K)
    flat = index.flatten()
    used = int((flat < E).sum())
    order = torch.sort(flat, stable=True).indices[:used].int()
    counts = torch.bincount(flat, minlength=E + 1)[:E]
    assert torch.equal(routing.row_slot[:used], order)
    assert torch.equal(routing.expert_offsets, torch.cat([torch.zeros(1), counts.cumsum(0)]).int())
    inverse = torch.full((T * K,), -1, dtype=torch.int32)
    inverse[order.long()] = torch.arange(used, dtype=torch.int32)
    assert torch.equal(routing.slot_row, inverse)


def check_tiles(tiles, routing, block_p):
    counts = routing.expert_offsets.diff()
    expected = torch.repeat_interleave(torch.arange(len(counts)), (counts + block_p - 1) // block_p).int()
    assert tiles.block_p == block_p and torch.equal(tiles.tile_expert[: len(expected)], expected)
    assert (tiles.tile_expert[len(expected) :] == -1).all()
    assert tiles.tile_offsets[0] == 0 and torch.equal(tiles.tile_offsets.diff(), (counts + block_p - 1) // block_p)


@pytest.mark.parametrize("block_p", [16, 128])
def test_every_row_lies_in_one_tile_of_its_expert(block_p):
    routing = sort_slots(routed(90, 3, 7, 0.3), 7, 270)
    tiles, same = list_tiles(routing, block_p)
    check_tiles(tiles, routing, block_p)
    assert same is tiles


@pytest.mark.parametrize("num_experts", [7, 200])
def test_experts_are_listed_by_their_rows(num_experts):
    """Idle ones last, equal ones in their own order; 200 experts are more than one program lists."""
    routing = sort_slots(routed(90, 3, num_experts, 0.3), num_experts, 270)
    tiles, _ = list_tiles(routing, 64)
    expected = routing.expert_offsets.diff().argsort(descending=True, stable=True)
    assert torch.equal(tiles.largest_first, expected.int())


def test_one_launch_lists_tiles_of_two_heights(monkeypatch):
    routing = sort_slots(routed(90, 3, 7, 0.3), 7, 270)
    launches = count_launches(monkeypatch, sort, "list_tiles")
    lists = TileLists(routing, together=[64, 1])
    for block_p in (64, 1):
        check_tiles(lists[block_p], routing, block_p)
    assert launches == [(5, 2)]


@pytest.mark.parametrize("block_p", [16, 64])
def test_the_sort_of_few_slots_brings_tiles_and_gives_what_the_sort_of_many_gives(monkeypatch, block_p):
    index = routed(700, 4, 300, 0.2)
    few, tiles = sort_and_tile(index, 300, 2800, block_p)
    check_tiles(tiles, few, block_p)
    monkeypatch.setattr(routing_module, "_FEW_SLOTS", 0)
    many, none = sort_and_tile(index, 300, 2800, block_p)
    assert none is None
    used = int(many.expert_offsets[-1])
    assert torch.equal(few.row_slot[:used], many.row_slot[:used])
    assert torch.equal(few.slot_row, many.slot_row) and torch.equal(few.expert_offsets, many.expert_offsets)


def test_the_sort_of_few_slots_leaves_an_understated_buffer_alone():
    index = routed(20, 2, 4)
    routing, tiles = sort_and_tile(index, 4, 10, 16)
    check_tiles(tiles, routing, 16)
    assert routing.expert_offsets[-1] == 10


def test_understated_num_rows_loses_the_last_slots_and_never_points_past_the_buffer(monkeypatch):
    index = routed(20, 2, 4)
    full = sort_slots(index, 4, 40)
    storage = torch.full((64,), -7, dtype=torch.int32)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: storage[:10] if shape == (10,) else empty(*shape, **kw))
    short = sort_slots(index, 4, 10)
    assert torch.equal(short.row_slot, full.row_slot[:10])
    assert (storage[10:] == -7).all()
    assert torch.equal(short.slot_row, full.slot_row.masked_fill(full.slot_row >= 10, -1))
    assert torch.equal(short.expert_offsets, full.expert_offsets.clamp(max=10))


def test_counts_grow_by_each_experts_slots_and_skip_numbers_of_none():
    index = routed(900, 3, 7, 0.3)
    index[:5] = torch.tensor([-1, -(2**40), 2**40])
    total = torch.arange(7)
    wanted = total + torch.bincount(index[(index >= 0) & (index < 7)], minlength=7)
    add_counts(index, total)
    assert torch.equal(total, wanted)
