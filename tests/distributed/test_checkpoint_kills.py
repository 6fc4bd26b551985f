"""Real saves killed before an event on the disk: what was committed is never lost, and nothing is left over.

The events are counted, not timed (tests/kills.py). The default suite takes some of them, --slow all.
"""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import pytest

from tests import ranks
from tests.distributed import kill_runs as runs
from tests.ranks import run_ranks

KINDS = [
    (kind, background, one) for kind in ("state", "trainer") for background in (False, True) for one in (True, False)
]


def named(values) -> str:
    kind, background, one_name = values
    return f"{kind} {'in the background' if background else 'at once'} {'onto one name' if one_name else 'numbered'}"


@pytest.mark.parametrize("kind, background, one_name", [KINDS[0], KINDS[7]], ids=map(named, [KINDS[0], KINDS[7]]))
def test_killed_before_some_events_of_a_save_the_old_or_the_new_one_loads_at_once(tmp_path, kind, background, one_name):
    seen = run_ranks(runs.kill_before_each_event, 1, str(tmp_path), kind, background, one_name, 5, 13)[0]
    assert seen[runs.OLD] and seen[runs.NEW], seen


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind, background, one_name", KINDS, ids=map(named, KINDS))
def test_killed_before_every_event_of_a_save_the_old_or_the_new_one_loads_at_once(tmp_path, kind, background, one_name):
    arguments = (str(tmp_path), kind, background, one_name, 1, 1)
    seen = run_ranks(runs.kill_before_each_event, 1, *arguments, timeout_s=3500)[0]
    print(named((kind, background, one_name)), seen)
    assert seen["events"] > 30 and seen[runs.OLD] > 20 and seen[runs.NEW] > 5, seen


def kill_two_ranks(root: str, kind: str, background: bool, one_name: bool, who: list[int], event: int) -> bool:
    """Whether a rank was killed; its peer is, when it does not end within seconds: it may wait for a lost rank."""
    context, port, logs = ranks._context(), ranks.free_port(), tempfile.mkdtemp()
    arguments = (root, kind, background, one_name, who, event)
    processes = [
        context.Process(
            target=ranks._child, args=(runs.save_and_die, arguments, r, 2, port, logs, False, {}), daemon=True
        )
        for r in range(2)
    ]
    for process in processes:
        process.start()
    processes[who[0]].join(180)
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
    killed = [processes[r].exitcode == -signal.SIGKILL for r in who]
    assert any(killed) or all(p.exitcode == 0 for p in processes), ranks._logs(logs)
    return any(killed)


def kill_and_go_on(tmp_path, kind: str, background: bool, one_name: bool, who: list[int], event: int) -> int | None:
    """The step that was loaded after the kill; None when the save has fewer events."""
    if not kill_two_ranks(str(tmp_path), kind, background, one_name, who, event):
        return None
    for loaded, left, expected in run_ranks(runs.load_and_go_on, 2, str(tmp_path), kind, one_name):
        assert loaded in (runs.OLD, runs.NEW) and left == expected, (loaded, left)
    return loaded


def test_of_two_ranks_the_one_that_commits_is_killed_and_its_peer_is_lost_too(tmp_path):
    assert kill_and_go_on(tmp_path, "state", False, True, [0], 40) in (runs.OLD, runs.NEW)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("who", [[0], [1], [0, 1]], ids=["rank 0", "rank 1", "both"])
@pytest.mark.parametrize("kind, background, one_name", [KINDS[0], KINDS[7]], ids=map(named, [KINDS[0], KINDS[7]]))
def test_two_ranks_killed_before_events_of_a_save_go_on(tmp_path, kind, background, one_name, who):
    outcomes = []
    for event in range(1, 200, 6 if 0 in who else 1):  # rank 1 writes its shards and its random state only
        root = tmp_path / str(event)
        root.mkdir()
        outcomes.append(kill_and_go_on(root, kind, background, one_name, who, event))
        if outcomes[-1] is None:
            break
    print(named((kind, background, one_name)), who, outcomes)
    assert runs.OLD in outcomes and (runs.NEW in outcomes or who == [1])


@pytest.mark.parametrize("one_name", [True, False], ids=["onto one name", "numbered"])
def test_node_local_disks_killed_between_two_nodes_commits_load_the_same_step(tmp_path, one_name):
    context, port, logs = ranks._context(), ranks.free_port(), tempfile.mkdtemp()
    arguments = (str(tmp_path), one_name)
    processes = [
        context.Process(
            target=ranks._child, args=(runs.kill_between_two_nodes_commits, arguments, r, 2, port, logs, False, {})
        )
        for r in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        process.kill()
    assert processes[1].exitcode == -signal.SIGKILL, ranks._logs(logs)
    left = [list(Path(tmp_path, f"node{r}").rglob("tmp-0-*")) for r in (0, 1)]
    assert left[1], "node 1 has a sealed folder"
    (tmp_path / "node0" / "committed.mark").unlink()
    name = ["c"] if one_name else ["checkpoints", f"checkpoints/checkpoint_{runs.NEXT}"]
    for result in run_ranks(runs.load_on_nodes, 2, str(tmp_path), one_name):
        assert result == (runs.NEW, name), result
