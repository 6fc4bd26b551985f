"""One rank's error is raised on every rank; and small Python objects go between ranks.

A step that fails on one rank, while the others go on to a collective, is a hang. So every step that can fail on one
rank runs inside `run_or_raise_everywhere`: its outcome is gathered, and the same error is raised everywhere.

Checkpoints do this over a gloo group of its own, beside NCCL: it takes no GPU memory, and the thread that saves in the
background can use it. Only one thread may use the group at a time; saving.py sees to that. `accelerator.prepare` passes
`over=WORLD`, the job's own group: a job that never saves does not make the other one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from accel_moe.config import spell_ranks
from accel_moe.errors import CheckpointError
from accel_moe.mesh import default_timeout
from accel_moe.whereabouts import explaining

T = TypeVar("T")
_group: tuple[Any, Any] | None = None  # (the default group it was made for, ours)


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def is_rank0() -> bool:
    """Whether this rank speaks for all: for what is logged once, also before the process group is there."""
    return (dist.get_rank() if distributed() else int(os.environ.get("RANK", "0"))) == 0


def world_size() -> int:
    return dist.get_world_size() if distributed() else 1


def group() -> Any:
    """The gloo group of all ranks; None in one process. The first call makes it, and is a collective."""
    global _group
    if not distributed():
        return None
    if _group is None or _group[0] is not dist.group.WORLD:
        _group = (dist.group.WORLD, explaining(dist.new_group)(backend="gloo", timeout=default_timeout()))
    return _group[1]


def close_group() -> None:
    """Ends the group and joins its threads; for the end of the process. Not a collective.

    A thread of gloo drops the tensors of its last collective after the collective returned. When that is after the
    interpreter began to shut down, the process aborts ("terminate called without an active exception",
    https://github.com/pytorch/pytorch/pull/179291), and a run that ends with a save ends with a gather.
    """
    global _group
    if _group is None:
        return
    world, ours = _group
    _group = None
    if dist.is_initialized() and world is dist.group.WORLD:
        dist.destroy_process_group(ours)


def gather(value: T, over: Any = None) -> list[T]:
    """Every rank's value, on every rank; values are pickled. A collective, by default over the gloo group."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    explaining(dist.all_gather_object)(values, value, group=over or group())
    return values


def from_rank0(value: T) -> T:
    """Rank 0's value. A collective of all ranks."""
    if not distributed():
        return value
    values = [value]
    explaining(dist.broadcast_object_list)(values, src=0, group=group())
    return values[0]


def barrier() -> None:
    gather(None)


def run_or_raise_everywhere(
    what: str, step: Callable[[], T], kind: type[Exception] = CheckpointError, over: Any = None
) -> T:
    """Runs `step` on this rank; raises a `kind` on every rank when it failed on any. A collective.

    `what` completes "<what> failed". A KeyboardInterrupt is not held back: the process is on its way out.
    """
    result: Any = None
    error: BaseException | None = None
    try:
        result = step()
    except (Exception, CheckpointException) as raised:  # DCP's is no Exception
        error = raised
    raise_everywhere(what, error, kind, over)
    return result


def raise_everywhere(
    what: str, error: BaseException | None, kind: type[Exception] = CheckpointError, over: Any = None
) -> None:
    """Raises on every rank when any rank brings an error. A collective.

    When all of them bring one, each raises its own; else all raise a `kind`, which says where it failed first. The same
    for DCP's errors and OSErrors, and for an error that has a mend (advice.py), also when all of them bring one.
    """
    told = gather(None if error is None else (describe(error, kind), _origins(error)), over)
    failed = [said for said in told if said is not None]
    if not failed:
        return
    ours = isinstance(error, CheckpointException | OSError) or hasattr(error, "mend")
    if len(failed) == len(told) and not ours:
        assert error is not None
        raise error
    where = sorted({origin for _, origins in failed for origin in origins})
    listed = spell_ranks(where[:8]) + (" and more" if len(where) > 8 else "")
    raise kind(f"{what} failed on {listed} of {len(told)}: {failed[0][0]}") from error


def _origins(error: BaseException) -> list[int]:
    """The ranks that an error comes from: DCP raises on all of them what happened on some."""
    return sorted(error.failures) if isinstance(error, CheckpointException) and error.failures else [rank()]


def describe(error: BaseException, kind: type[Exception] = CheckpointError) -> str:
    """One line for a message: DCP's wrapper is opened, a traceback is not quoted, a mend (advice.py) is added.

    A `kind` is an error of ours, whose text is whole.
    """
    if isinstance(error, CheckpointException) and error.failures:
        first: Any = error.failures[min(error.failures)]
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, kind):
        return str(error)
    mend = getattr(error, "mend", "")
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        text = f"{error.strerror}{where} ({type(error).__name__})"
    else:
        said = str(error).strip()
        text = f"{type(error).__name__}: {said.splitlines()[0]}" if said else type(error).__name__
    return f"{text}. {mend}" if mend else text


def host() -> str:
    return socket.gethostname()


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
