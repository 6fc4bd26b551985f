"""Kill a process before its N-th event on the disk: mkdir, open for writing, rename, link, removal, fsync.

for n in every_event(save):        # `save` runs in a forked child, killed before its n-th event
    ...                            # look at what is left
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.symlink")
_hooked: dict = {}


def die_before(event: int) -> None:
    """Kills this process before its `event`-th event from now on, on any of its threads. 0: never, only count."""
    _hooked.update(seen=0, event=event, pid=os.getpid())
    if "fsync" in _hooked:
        return
    _hooked["fsync"] = fsync = os.fsync

    def watched(descriptor):
        _count("fsync")
        return fsync(descriptor)

    os.fsync = watched
    sys.addaudithook(_audit)


def events_seen() -> int:
    return _hooked["seen"]


def stop_counting() -> None:
    _hooked["pid"] = 0


def _audit(name: str, args: tuple) -> None:
    if name in _EVENTS:
        _count(name)
    elif name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if not str(args[0]).startswith(("/dev/", "/proc/")):
            _count(name)


def _count(name: str) -> None:
    if _hooked.get("pid") != os.getpid():
        return
    _hooked["seen"] += 1
    if _hooked["seen"] == _hooked["event"]:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_before(event: int, action: Callable[[], None]) -> bool:
    """Runs `action` in a forked child, killed before its `event`-th event. False when it ended before that."""
    child = os.fork()
    if child == 0:
        code = 1
        faulthandler.dump_traceback_later(120, exit=True)  # a fork may inherit a lock that nobody will release
        try:
            die_before(event)
            action()
            stop_counting()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return False


def every_event(action: Callable[[], None], first: int = 1, stride: int = 1) -> Iterator[int]:
    """first, first + stride, ...: after each, `action` was killed before that event. Ends when it ran to its end."""
    event = first
    while killed_before(event, action):
        yield event
        event += stride
