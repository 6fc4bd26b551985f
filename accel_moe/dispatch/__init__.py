"""Tokens to the ranks that own their experts, and back: `base` is the protocol, `automatic` chooses between the
backends `all_gather`, `symmetric` and `all_to_all`, and here is the list of those that exist."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed import ProcessGroup

from accel_moe.dispatch.all_gather import AllGatherDispatcher
from accel_moe.dispatch.all_to_all import AllToAllDispatcher
from accel_moe.dispatch.automatic import AutomaticDispatcher
from accel_moe.dispatch.base import Dispatcher
from accel_moe.dispatch.symmetric import SymmetricDispatcher

DISPATCHERS: dict[str, Callable[[ProcessGroup, int], Dispatcher]] = {
    "auto": AutomaticDispatcher,
    "all_gather": AllGatherDispatcher,
    "all_to_all": AllToAllDispatcher,
    "symmetric": SymmetricDispatcher,
}
"""By name: (ep group, number of experts in all) -> dispatcher. Made by all ranks of the group together."""


def known_dispatcher(name: str) -> Callable[[ProcessGroup, int], Dispatcher]:
    """The dispatcher called `name`. Raises ValueError when there is none."""
    if name not in DISPATCHERS:
        raise ValueError(f"moe_dispatcher={name!r} is not registered. Use one of {', '.join(sorted(DISPATCHERS))}.")
    return DISPATCHERS[name]


def make_dispatcher(name: str, group: ProcessGroup, num_experts: int) -> Dispatcher:
    """Build the dispatcher called `name` for one ep group. A collective over the group."""
    return known_dispatcher(name)(group, num_experts)
