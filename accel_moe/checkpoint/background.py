"""Saves in the background: one thread at a time, and ends of the process that wait for it.

`moe_async_save` stages the tensors in host memory; writing, sealing and committing run in a thread. A second save, a
load, and the end of training wait for it first. Its failure is raised by the next forward, the next save, or the end
of training, whichever comes first, and makes the process exit with a non-zero status if none of them does.

A save that began is committed however the script ends, save by a kill:

    it returns, raises, or calls sys.exit    `threading` waits for the thread before concurrent.futures closes its pools
    it destroys the process group            the group's shutdown waits, whichever name destroy_process_group has there
    SIGTERM (preemption, torchrun)           the save under way, in the background or not, ends first; then the process
                                             dies by the signal; a second SIGTERM ends it at once

A handler for SIGTERM that somebody else installed is left alone.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # its end-of-process function must be registered before ours: they run in reverse
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from accel_moe import ranks
from accel_moe.errors import CheckpointError
from accel_moe.patching import patch

logger = logging.getLogger("accel_moe")

_background: Future[None] | None = None
_thread: threading.Thread | None = None


# --- the thread --------------------------------------------------------------------------------------------------


def start(work: Callable[[], None], models: Iterable[Any]) -> None:
    """Runs `work` in a thread. The models' next forwards raise what it raised."""
    global _background, _thread
    if not _outlives_the_script:
        logger.warning(
            "this Python has no threading._register_atexit: a save in the background could be lost at the end of the "
            "script, so it runs at once."
        )
        work()
        return
    future: Future[None] = Future()
    ranks.group()  # made here: making it is a collective of the main thread

    def run() -> None:
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    _background = future
    for model in models:
        _watch(model)
    _thread = threading.Thread(target=run, name="accel_moe-save")  # not a daemon: the interpreter waits for it
    _thread.start()


def wait_for_background() -> None:
    """Waits for a save in the background, if there is one; raises what it raised, once. Not a collective."""
    global _background
    if _background is not None:
        future, _background = _background, None
        try:
            _raise(future)
        finally:
            _restore_sigterm()


def raise_failure() -> None:
    """Raises what a finished background save raised, once; does not wait."""
    if _background is not None and _background.done():
        wait_for_background()


def exists() -> bool:
    """Whether there is a save in the background whose end nobody waited for."""
    return _background is not None


def under_way() -> bool:
    return _background is not None and not _background.done()


def _wait_in_silence() -> None:
    """Waits for the save; a failure stays to be raised. Does nothing in the thread of the save itself."""
    if _background is not None and threading.current_thread() is not _thread:
        concurrent.futures.wait([_background])


def _raise(future: Future[None]) -> None:
    try:
        future.result()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"saving in the background failed: {ranks.describe(error)}") from error


def _watch(model: Any) -> None:
    """Makes the model's next forwards raise a background failure."""
    if not getattr(model, "_accel_moe_watched", False):
        model.register_forward_pre_hook(lambda *_: raise_failure())
        model._accel_moe_watched = True


# --- the end of the process --------------------------------------------------------------------------------------


def _wait_before_pools_close() -> bool:
    """Has `threading` wait for the save before it closes the pools that the save hashes with. False: it cannot."""
    register = getattr(threading, "_register_atexit", None)
    if register is None:
        return False
    try:
        register(_wait_in_silence)
    except RuntimeError:  # the interpreter is shutting down already
        return False
    return True


_outlives_the_script = _wait_before_pools_close()


@atexit.register
def _at_exit() -> None:
    """A failed background save that nobody heard of must not look like success."""
    try:
        wait_for_background()
    except CheckpointError as error:
        print(f"accel_moe: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    if not hasattr(sys, "last_type"):  # after an error a collective may still be waiting for a lost rank
        ranks.close_group()


@patch(
    "torch.distributed.ProcessGroup.shutdown",
    why="destroy_process_group, which scripts import by name, ends the groups that a save in the background uses; it "
    "calls this first.",
    tested="torch 2.13",
)
def shutdown(original, self):
    _wait_in_silence()
    return original(self)


# --- SIGTERM -----------------------------------------------------------------------------------------------------

_saves = 0  # calls of the main thread that are inside a save
_asked = False  # SIGTERM came, and a save is finished first
_process = 0  # the process that installed the handler: a forked worker inherits it


def ends_before_sigterm(save: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function that saves: SIGTERM during it, or during the background's part, takes effect afterwards.

    Only in the main thread, and only where SIGTERM would have killed the process.
    """

    @functools.wraps(save)
    def wrapped(*args, **kwargs):
        global _saves
        if threading.current_thread() is not threading.main_thread():
            return save(*args, **kwargs)
        _install_sigterm()
        _saves += 1
        try:
            return save(*args, **kwargs)
        except BaseException as error:
            if _asked:
                _say(f"the save during which SIGTERM came failed: {ranks.describe(error)}")
            raise
        finally:
            _saves -= 1
            if _saves == 0 and _asked:
                _wait_in_silence()
                _die()
            _restore_sigterm()

    return wrapped


def _install_sigterm() -> None:
    global _process
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)
        _process = os.getpid()


def _restore_sigterm() -> None:
    """Gives SIGTERM its default back once no save is under way: a handler of Python's is deaf inside a collective."""
    if (
        _saves == 0
        and not under_way()
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is _on_sigterm
    ):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _on_sigterm(signum: int, frame: Any) -> None:
    global _asked
    if os.getpid() != _process or _asked or not (_saves or under_way()):
        _die()
        return
    _asked = True
    _say("SIGTERM: the save under way is finished first. A second SIGTERM ends the process at once.")
    if not _saves:
        _wait_in_silence()
        _die()


def _die() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _say(text: str) -> None:
    """On stderr, past Python's buffers: a signal handler may have interrupted a print."""
    os.write(2, f"accel_moe: {text}\n".encode())
