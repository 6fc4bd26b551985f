"""The helper that runs a function on ranks: what it repeats, and what it does not."""

from __future__ import annotations

import ctypes
import os
import signal

import pytest

from tests.ranks import run_ranks


def crash_in_a_thread_of_its_own_the_first(times: int, folder: str) -> str:
    """raise(SIGSEGV) as the start routine of a native thread, which Python knows nothing of."""
    runs = os.path.join(folder, os.environ["RANK"])
    with open(runs, "a") as f:
        f.write(".")
    if os.path.getsize(runs) <= times:
        libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
        libc.pthread_create(ctypes.byref(thread), None, libc["raise"], ctypes.c_void_p(signal.SIGSEGV))
        libc.pthread_join(thread, None)
    return "done"


def crash_in_python(folder: str) -> None:
    with open(os.path.join(folder, "runs"), "a") as f:
        f.write(".")
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_of_a_native_thread_is_repeated_once_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="Segmentation fault"):
        assert run_ranks(crash_in_a_thread_of_its_own_the_first, 1, 1, str(tmp_path)) == ["done"]
    twice = tmp_path / "twice"
    twice.mkdir()
    with pytest.warns(UserWarning), pytest.raises(AssertionError, match="Segmentation fault"):
        run_ranks(crash_in_a_thread_of_its_own_the_first, 1, 2, str(twice))


def test_a_crash_under_python_is_not_repeated(tmp_path):
    with pytest.raises(AssertionError, match="Segmentation fault"):
        run_ranks(crash_in_python, 1, str(tmp_path))
    assert (tmp_path / "runs").read_text() == "."
