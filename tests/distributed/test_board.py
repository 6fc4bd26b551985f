"""The page that the hosts of a node share, and which dispatcher is taken because of it."""

import datetime
import platform
import random
import time

import pytest
import torch
import torch.distributed as dist

from accel_moe.dispatch.base import Overlap, RoutedTokens
from tests.ranks import run_ranks

HALF_A_MINUTE = datetime.timedelta(seconds=30)


def turns(count: int, pause_s: float) -> list[list[tuple[int, ...]]]:
    from accel_moe.dispatch.host_all_gather import LARGEST, host_all_gather_of

    dist.init_process_group("gloo")
    board = host_all_gather_of(dist.group.WORLD, 2, HALF_A_MINUTE)
    assert board is not None and host_all_gather_of(dist.group.WORLD, 2, HALF_A_MINUTE) is board
    rank, seen = dist.get_rank(), []
    for turn in range(count):
        if random.random() < 0.1:
            time.sleep(random.random() * pause_s)
        seen.append(board.exchange((100 * turn + rank, LARGEST + rank)))
    return seen


@pytest.mark.parametrize(("count", "pause_s"), [(500, 0.01), (5, 1.5)])
def test_every_rank_sees_every_rank_s_numbers_of_this_turn(count, pause_s):
    expected = [[(100 * turn + rank, 2**32 - 1) for rank in range(4)] for turn in range(count)]
    assert run_ranks(turns, 4, count, pause_s) == [expected] * 4


class Large(Overlap):
    """No work, but an experts function that takes much memory."""

    def __init__(self, bytes_per_pair: int):
        self.bytes_per_pair = bytes_per_pair


def on_two_nodes(how: str) -> tuple[bool, str]:
    from accel_moe.dispatch import AllGatherDispatcher, AutomaticDispatcher, host_all_gather

    dist.init_process_group("gloo")
    if how == "name":
        platform.node = lambda: f"node {dist.get_rank() // 2}"
    elif dist.get_rank() == 3:
        host_all_gather._mapped = lambda path, size: None
    found = host_all_gather.host_all_gather_of(dist.group.WORLD, 2, HALF_A_MINUTE) is None
    automatic = AutomaticDispatcher(dist.group.WORLD, 8)
    hidden = torch.ones(3, 4)
    sent = automatic.dispatch(RoutedTokens(hidden, torch.arange(24).view(3, 8) % 8, torch.ones(3, 8)))
    assert isinstance(sent.num_pairs, int)  # all_to_all
    assert torch.equal(automatic.combine(sent.rows, sent), 4 * hidden)
    try:
        AllGatherDispatcher(dist.group.WORLD, 8)
    except ValueError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("how", ["name", "no file"])
def test_ranks_that_share_no_memory_all_take_the_all_to_all(how):
    for none, error in run_ranks(on_two_nodes, 4, how):
        assert none and "/dev/shm" in error and "moe_dispatcher='auto'" in error


def exchanges(top_k: int) -> list[bool]:
    """Whether `auto` sent every token to every rank: as it is, and where a rank is small."""
    from accel_moe.dispatch import AutomaticDispatcher, memory

    dist.init_process_group("gloo")
    automatic = AutomaticDispatcher(dist.group.WORLD, 8)
    hidden, index = torch.ones(5, 4), torch.arange(5 * top_k).view(5, top_k) % 8
    took = []
    for capacity in (memory.UNKNOWN, 2**20):
        memory.capacity_bytes = lambda device, have=capacity: have if dist.get_rank() == 1 else memory.UNKNOWN
        sent = automatic.dispatch(RoutedTokens(hidden, index, torch.ones(5, top_k)), Large(2**16))
        needed = (sent.local_index < 8 // dist.get_world_size()).any(1, keepdim=True)
        out = automatic.combine(sent.rows * needed, sent)
        took.append(not isinstance(sent.num_pairs, int))
        ranks = torch.tensor([len(set(row)) for row in (index // (8 // dist.get_world_size())).tolist()])
        torch.testing.assert_close(out, hidden * ranks[:, None])
    return took


@pytest.mark.parametrize(("world", "top_k", "expected"), [(2, 2, True), (2, 1, False), (4, 8, True), (4, 2, False)])
def test_auto_sends_every_token_everywhere_where_most_are_needed_and_all_would_fit(world, top_k, expected):
    for as_it_is, crowded in run_ranks(exchanges, world, top_k):
        assert as_it_is == expected and not crowded


def crowded() -> str:
    from accel_moe.dispatch import AllGatherDispatcher, memory

    dist.init_process_group("gloo")
    dispatcher = AllGatherDispatcher(dist.group.WORLD, 8)
    memory.free_bytes = lambda device: 2**20 if dist.get_rank() == 1 else memory.UNKNOWN
    tokens = RoutedTokens(torch.ones(5, 4), torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        dispatcher.dispatch(tokens, Large(2**20))
    dispatcher.dispatch(tokens)
    return str(caught.value)


def test_an_all_gather_that_cannot_fit_is_refused_by_every_rank_and_names_the_ways_out():
    for text in run_ranks(crowded, 2):
        assert "moe_dispatch_chunk_tokens" in text and "moe_dispatcher: all_to_all" in text and "10 rows" in text


def one_board_after_another() -> int:
    from accel_moe.dispatch import host_all_gather

    for _ in range(3):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        assert host_all_gather.host_all_gather_of(dist.group.WORLD, 2, HALF_A_MINUTE) is not None
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    host_all_gather.host_all_gather_of(dist.group.WORLD, 2, HALF_A_MINUTE)
    return len(host_all_gather._boards)


def test_the_boards_of_groups_that_are_no_more_are_let_go():
    assert run_ranks(one_board_after_another, 1) == [1]


def test_a_full_folder_gives_no_board_and_leaves_no_file(monkeypatch, tmp_path):
    import os
    import tempfile

    from accel_moe.dispatch import host_all_gather

    class Full:
        def write(self, data):
            raise OSError("No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

    handle, path = tempfile.mkstemp(dir=tmp_path)
    os.close(handle)
    monkeypatch.setattr(host_all_gather.tempfile, "mkstemp", lambda **_: (handle, path))
    monkeypatch.setattr(host_all_gather.os, "fdopen", lambda *_: Full())
    assert host_all_gather._new_file(4096) is None
    assert not list(tmp_path.iterdir())
