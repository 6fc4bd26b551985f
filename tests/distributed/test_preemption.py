"""One rank is signalled, and all ranks stop after the same step."""

import os
import signal
import time

import pytest

from tests.ranks import run_ranks

SIGNALLED_IN = 3


def step_of_the_stop(way: str) -> tuple[str, int]:
    """(how the ranks agreed, the step after which this rank stopped); rank 1 is signalled in its third step."""
    from accelerate import PartialState

    from accel_moe import Preemption
    from accel_moe.checkpoint import preemption as module

    state = PartialState(cpu=True)
    if way == "over gloo":
        module.new_board = lambda *_: None
    preemption = Preemption()
    step = 0
    while step < 20:
        step += 1
        if state.process_index == 1 and step == SIGNALLED_IN:
            os.kill(os.getpid(), signal.SIGTERM)
            while not preemption._signal.asked:
                time.sleep(0.01)
        if preemption.stops():
            break
    preemption.close()
    return type(preemption._agreement).__name__, step


@pytest.mark.parametrize(
    "way, kind, step",
    [("in host memory", "_InHostMemory", SIGNALLED_IN), ("over gloo", "_OverGloo", SIGNALLED_IN + 1)],
)
def test_all_ranks_stop_after_the_same_step(way, kind, step):
    assert run_ranks(step_of_the_stop, 4, way) == [(kind, step)] * 4
