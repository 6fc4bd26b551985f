"""The exchange over shared memory: what its turns may not do to each other, and where it is refused.

That it trains like one process is in the parity table; that it exchanges rightly for every routing, in
test_dispatch.py.
"""

import datetime
import random
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def device_of_rank() -> torch.device:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else torch.device("cpu")


def take_turns(dtype: torch.dtype) -> None:
    """300 turns of both kinds, of changing sizes, each rank late for some of them, and several under way at once: every
    one brings what the group's own collective brings."""
    from accel_moe.dispatch.symmetric import SymmetricDispatcher

    device = device_of_rank()
    rank, world = dist.get_rank(), dist.get_world_size()
    link = SymmetricDispatcher.link_of(dist.group.WORLD)
    assert link is not None and SymmetricDispatcher.link_of(dist.group.WORLD) is link
    same, own = random.Random(0), random.Random(rank)
    numbers = torch.Generator().manual_seed(rank)
    under_way = []

    def check_all() -> None:
        for arrival, found, wanted in under_way:
            arrival.wait()
            assert torch.equal(found, wanted)
        under_way.clear()

    for turn in range(300):
        rows = same.choice([1, 3, 17]) if turn < 200 else same.choice([64, 5])
        mine = torch.randn(world * rows, 6, generator=numbers).to(device, dtype)
        if own.random() < 0.1:
            time.sleep(0.002)
        everyone = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(everyone, mine)
        if same.random() < 0.5:
            found = torch.full_like(mine, 7.0)
            part = link.outbox(found) if same.random() < 0.5 else torch.empty_like(mine[:rows])
            part.copy_(mine[:rows])
            arrival, wanted = link.gather(part, found), torch.cat([other[:rows] for other in everyone])
        else:
            found, arrival = link.sum(mine)
            wanted = sum(other[rank * rows : (rank + 1) * rows].float() for other in everyone).to(dtype)
        under_way.append((arrival, found, wanted))
        if same.random() < 0.4:
            check_all()
    check_all()
    assert link._buffers.size >= 64 * 6 * dtype.itemsize


@pytest.mark.core
@pytest.mark.parametrize("world, dtype", [(1, torch.float32), (2, torch.bfloat16), (4, torch.float32)], ids=str)
def test_turns_with_the_same_buffers_do_not_disturb_each_other(world, dtype):
    run_ranks(take_turns, world, dtype)


def without_shared_memory(how: str) -> tuple[str, str]:
    from accel_moe.dispatch import AllGatherDispatcher, SymmetricDispatcher, host_all_gather, make_dispatcher, symmetric

    device_of_rank()
    if how == "no memory":  # for the buffers, where the small page of numbers was had
        AllGatherDispatcher.board(dist.group.WORLD)
        board = host_all_gather.new_board(dist.group.WORLD, 1, datetime.timedelta(seconds=60))
        symmetric.new_board = lambda *arguments: board
    if dist.get_rank() == 1:
        if how == "no peer":
            symmetric.can_map_peers = lambda group: False
        else:
            host_all_gather._mapped = lambda path, size: None
    kind = type(make_dispatcher("auto", dist.group.WORLD, 8)._all_gather).__name__
    try:
        SymmetricDispatcher(dist.group.WORLD, 8)
    except ValueError as error:
        return kind, str(error)
    return kind, ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes a host's memory away, which GPUs do not share")
@pytest.mark.parametrize("how", ["no file", "no peer", "no memory"])
def test_ranks_of_which_one_cannot_share_memory_all_refuse_it_and_auto_takes_another(how):
    for kind, error in run_ranks(without_shared_memory, 2, how):
        assert kind == ("NoneType" if how == "no file" else "AllGatherDispatcher")
        assert "map each other's memory" in error and "moe_dispatcher='auto'" in error
