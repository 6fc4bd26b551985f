"""A rank that waits in vain says what the other ranks are doing.

It may wait for them before a call that every rank must make, or in a collective that fails.

    note      writes this rank's last call or kind of forward under a key of the job's store, when it changes
    meet      waits, before a call's first collective, until the other ranks have arrived at the same call

A rank that waits reads after `LOOK_S` seconds where the missing ranks are. A rank that waits in another call, or has
reached the end of its script, will never come: that is an error at once. A rank that may only be slow is waited for.
After `WARN_S` seconds a warning names the missing ranks, and the call goes on into its collective. The collective fails
at once if a rank died, and at the process group's timeout if one never comes.

The store is torch.distributed's own: sockets, no collective, no GPU. Nothing here runs in a layer or in backward. The
first forward after a change of kind costs a write, and two reads where kinds alternate.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from accel_moe.config import spell_ranks as listed
from accel_moe.patching import ACCELERATE, patch

logger = logging.getLogger("accel_moe")

LOOK_S = 5.0  # before the first look at where the missing ranks are
WARN_S = 15.0  # before a warning, when they may only be slow
_AGAIN_S = 2.0  # between two looks that must agree
_PAUSES_S = (0.0005, 0.25)  # between two questions: the first pause, doubled up to the last

REFUSAL = "a refusal of its batch"
TRAINING = "a forward of the model (training)"
EVALUATION = "a forward of the model without gradients (evaluation, generation)"


class Record(NamedTuple):
    """The place where a rank was last seen.

    `waits`: it stays there until `count` ranks from `first` on have come, for the nth time.
    """

    what: str
    nth: int
    waits: bool
    first: int
    count: int
    at_s: float


_nth: Counter[str] = Counter()
_here = ""


def _store() -> Any:
    """The job's store under a prefix of ours; None in one process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    try:
        return dist.PrefixStore("accel_moe", dist.distributed_c10d._get_default_store())
    except (AttributeError, RuntimeError, ValueError):  # a backend without one
        return None


def note(what: str) -> None:
    """Says what this rank does from now on. Writes only when that changes."""
    if what != _here and (store := _store()) is not None:
        _write(store, Record(what, 0, False, 0, 0, time.time()))


def note_refusal(error: ValueError) -> None:
    """Says that this rank raises `error` over a batch, by the error's first sentence. The end of the script repeats it,
    unless a forward comes before."""
    note(f"{REFUSAL} ({str(error).split('. ')[0]})")


def _write(store: Any, record: Record) -> None:
    global _here
    _here = record.what
    with contextlib.suppress(RuntimeError):  # rank 0, which keeps the store, has died: others say so
        store.set(f"at/{dist.get_rank()}", json.dumps(record))


def _read(store: Any, members: range) -> dict[int, Record]:
    found = {}
    keys = {rank: f"at/{rank}" for rank in members}
    with contextlib.suppress(RuntimeError):
        if not store.check(list(keys.values())):  # one request, where all have noted something
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        for rank, value in zip(keys, store.multi_get(list(keys.values()))):
            found[rank] = Record(*json.loads(value))
    return found


# --- calls that every rank makes ---------------------------------------------------------------------------------


def meet(what: str, advice: str = "", members: range | None = None) -> None:
    """Waits a while until all `members` (by default all ranks) are here. Each of them calls it, before a collective.

    Returns when all have come, or with a warning after `WARN_S` seconds: the collective itself then waits for a slow
    rank, and fails for a dead one.

    Raises:
        RuntimeError: a missing rank waits elsewhere, or has reached the end of its script.
    """
    store = _store()
    if store is None:
        return
    members = members if members is not None else range(dist.get_world_size())
    _nth[what] += 1
    record = Record(what, _nth[what], True, members.start, len(members), time.time())
    _write(store, record)
    key = f"met/{what}/{members.start}/"
    try:
        met = store.add(f"{key}{record.nth}", 1) == len(members) or _all_came(store, key, record, members, advice)
        if met and dist.get_rank() == members.start and record.nth > 2:
            store.delete_key(f"{key}{record.nth - 2}")  # all have passed the meeting after it
    except dist.DistError:
        return  # the store's host died: the collective says so
    if met:
        _write(store, record._replace(nth=0, waits=False))


def _all_came(store: Any, key: str, record: Record, members: range, advice: str) -> bool:
    look_at, lost = LOOK_S, {}
    for waited in waiting(lambda: store.add(f"{key}{record.nth}", 0) >= len(members)):
        if waited < look_at:
            continue
        look_at = waited + _AGAIN_S
        seen = _read(store, members)
        missing = [rank for rank in members if not _is_here(seen.get(rank), record)]
        never = {rank: seen[rank] for rank in missing if rank in seen and _never_comes(seen[rank], record)}
        if never and never == lost:
            raise RuntimeError(_told(record.what, missing, seen, advice, waited))
        lost = never
        if waited >= WARN_S:
            if missing and min(rank for rank in members if rank not in missing) == dist.get_rank():
                told = _told(record.what, missing, seen, advice, waited)
                logger.warning("%s If it is only slow, nothing is wrong: it is waited for.", told)
            return False
    return True


def waiting(until: Callable[[], bool]) -> Iterator[float]:
    """The seconds waited so far, each time that `until` said no; it is asked at once, and then ever more rarely."""
    since, pause_s = time.monotonic(), _PAUSES_S[0]
    while not until():
        yield time.monotonic() - since
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _PAUSES_S[1])


def _is_here(seen: Record | None, record: Record) -> bool:
    return seen is not None and seen.waits and (seen.what, seen.nth) == (record.what, record.nth)


def _never_comes(seen: Record, record: Record) -> bool:
    """Whether a missing rank waits for this one at a call that this one has not made, so that neither can go on."""
    if not seen.waits or seen.what == record.what:
        return False
    needs_us = seen.first <= dist.get_rank() < seen.first + seen.count
    return seen.count == 0 or (needs_us and _nth[seen.what] < seen.nth)


def _told(what: str, missing: list[int], seen: dict[int, Record], advice: str, waited_s: float) -> str:
    here = [rank for rank in seen if rank not in missing]
    return (
        f"{what} is called by every rank, and {listed(missing)} {'is' if len(missing) == 1 else 'are'} not there after "
        f"{waited_s:.0f} s; {listed(here)} waited. Last seen: {_places(seen, missing)}. "
        f"{advice or 'Call it on every rank, outside of `if is_main_process`.'}"
    )


def _places(seen: dict[int, Record], members: list[int] | range) -> str:
    """The places where ranks were last seen, each with its ranks."""
    places: dict[str, list[int]] = {}
    now = time.time()
    for rank in members:
        record = seen.get(rank)
        place = (
            "nowhere yet" if record is None else f"{'waiting ' if record.waits and record.count else ''}{_in(record)}"
        )
        places.setdefault(place, []).append(rank)
    parts = []
    for place, at in list(places.items())[:8]:
        since = [now - seen[rank].at_s for rank in at if rank in seen]
        parts.append(f"{listed(at)} {place}" + (f", begun {max(0.0, max(since)):.0f} s ago" if since else ""))
    return "; ".join(parts)


def _in(record: Record) -> str:
    return f"in {record.what}" if record.count or not record.waits else f"at {record.what}"


# --- where a collective fails ------------------------------------------------------------------------------------

_FAILED = re.compile(r"gloo|NCCL|collective|process group|pair closure|Timed out|Connection (closed|reset)", re.I)
_MARK = "where every rank was last seen:"


def explained(error: BaseException) -> BaseException:
    """The error of a collective, its text extended by what every rank was doing, if the store knows it."""
    if _MARK not in str(error) and len(error.args) <= 1 and (told := everybody()):
        error.args = (f"{error}\n{told}",)
    return error


def everybody() -> str:
    """One line on what every rank was doing; "" if the store knows nothing."""
    store = _store()
    if store is None:
        return ""
    members = range(dist.get_world_size())
    seen = _read(store, members)
    return f"accel_moe: {_MARK} {_places(seen, members)}." if seen else ""


def explaining(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function that does a collective: its RuntimeErrors are `explained`."""

    @functools.wraps(collective)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return collective(*args, **kwargs)
        except RuntimeError as error:
            raise explained(error)  # noqa: B904  # the same error

    return wrapped


def watch(model: torch.nn.Module, members: range) -> None:
    """Notes the model's kind of forward; where it changes, `members` meet, as a forward is a collective of theirs.

    The kind is autograd's: `model.eval()` on a single rank changes no collective.
    """
    if getattr(model, "_accel_moe_kind", None) is None:
        model._accel_moe_kind = TRAINING  # type: ignore[assignment]
        # before FSDP's own hook, which gathers weights
        model.register_forward_pre_hook(functools.partial(_before_forward, members), prepend=True)


@torch.compiler.disable
def _before_forward(members: range, module: Any, args: Any) -> None:
    kind = TRAINING if torch.is_grad_enabled() else EVALUATION
    if kind != module._accel_moe_kind:
        module._accel_moe_kind = kind
        meet(kind, "Every rank makes the same forwards: evaluate and generate on all of them.", members)
    elif kind != _here:
        note(kind)


def watch_the_end() -> None:
    """From now on, the end of this rank's script is noted, and a collective's error that ends it is `explained`."""
    global _watching
    if _watching:
        return
    _watching = True
    if (register := getattr(threading, "_register_atexit", None)) is not None:
        register(_note_the_end)
    before = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, RuntimeError) and _FAILED.search(str(error)):
            explained(error)
        before(kind, error, trace)

    sys.excepthook = excepthook


_watching = False


def _note_the_end() -> None:
    after = f", after {_here}" if _here.startswith(REFUSAL) else ""
    if (store := _store()) is not None:
        _write(store, Record(f"the end of its script{after}", 0, True, 0, 0, time.time()))


# --- calls of accelerate -----------------------------------------------------------------------------------------


@patch(
    "accelerate.Accelerator.wait_for_everyone",
    why="A rank that skipped a call of all ranks often waits here: those that made the call are told so.",
    tested=ACCELERATE,
)
def wait_for_everyone(original, self):
    if (store := _store()) is None:
        return original(self)
    what = "Accelerator.wait_for_everyone"
    _nth[what] += 1
    record = Record(what, _nth[what], True, 0, dist.get_world_size(), time.time())
    _write(store, record)
    original(self)
    _write(store, record._replace(nth=0, waits=False))


@patch(
    "accelerate.Accelerator.get_state_dict",
    why="It gathers a sharded model's weights, and hangs without a word where one rank alone calls it.",
    tested=ACCELERATE,
)
def get_state_dict(original, self, model, unwrap=True):
    if getattr(model, "_accel_moe_kind", None) is None:
        return original(self, model, unwrap)
    meet(
        "Accelerator.get_state_dict",
        "Call it, and save_model of Accelerator and Trainer, on every rank: the main one alone writes.",
    )
    return explaining(original)(self, model, unwrap)
