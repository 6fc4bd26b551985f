"""Run a function on several gloo (or NCCL) ranks and get its results, or its traceback, back.

    results = run_ranks(function, 2, argument)      # function(argument) on ranks 0 and 1; a list of their results

Ranks are forked from a server that has imported torch, transformers and accelerate once: a rank starts in
milliseconds, and accelerate's singletons are new in each. The function must be importable (top level of a test
module) and its arguments and results picklable.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from importlib.util import find_spec

import pytest
import torch

TIMEOUT_S = 240
PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "accelerate",
    "transformers",
    "transformers.integrations.moe",
    "transformers.trainer",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.mixtral.modeling_mixtral",
    "accel_moe.api",
]


def _context():
    # With GPUs too: nothing that the server imports starts CUDA (tests/conftest.py makes torch ask NVML instead), but
    # bitsandbytes, which accelerate imports, asks each GPU for its kind.
    if torch.cuda.is_available() and find_spec("bitsandbytes") is not None:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def free_port() -> int:
    """One below those that outgoing connections are given: among these, another test's may take it before we listen."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def run_ranks(
    function, world_size: int, *args, timeout_s: float = TIMEOUT_S, interpret: bool = False, env: dict | None = None
) -> list:
    """Call function(*args) on `world_size` ranks; `interpret` lets Triton kernels run on the CPU there.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or the time ran out.
    """
    if torch.cuda.is_available() and world_size > torch.cuda.device_count():
        pytest.skip(f"needs {world_size} GPUs, {torch.cuda.device_count()} here")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        return _run_ranks(function, world_size, args, timeout_s, interpret, env or {})
    except CrashedOutsidePython as crash:
        warnings.warn(f"{crash}\nThe ranks run once more.", stacklevel=2)
        return _run_ranks(function, world_size, args, timeout_s, interpret, env or {})


class CrashedOutsidePython(AssertionError):
    """A segmentation fault in a thread that runs no Python: one of gloo's own.

    Seen once in some ten thousand runs, while the main thread waited in `wait_tensor`. Such a run says nothing of our
    code, so `run_ranks` repeats it, once, with a warning. A crash under a Python call is never repeated.
    """


def _run_ranks(function, world_size: int, args, timeout_s: float, interpret: bool, env: dict) -> list:
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            context.Process(
                target=_child, args=(function, args, rank, world_size, port, folder, interpret, env), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_s
        try:
            _wait(ranks, deadline, folder)
            results = []
            for rank in range(world_size):
                with open(os.path.join(folder, f"{rank}.result"), "rb") as f:
                    results.append(pickle.load(f))
            return results
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def _wait(ranks, deadline: float, folder: str) -> None:
    while any(p.is_alive() for p in ranks):
        failed = [r for r, p in enumerate(ranks) if p.exitcode not in (None, 0)]
        if failed:
            patience = time.monotonic() + 5.0  # let the others say why, too
            while any(p.is_alive() for p in ranks) and time.monotonic() < patience:
                time.sleep(0.05)
            break
        if time.monotonic() > deadline:
            stacks = _logs(folder)
            raise AssertionError(f"ranks still running at the time limit: {[p.is_alive() for p in ranks]}\n{stacks}")
        time.sleep(0.02)
    failed = [r for r, p in enumerate(ranks) if p.exitcode not in (None, 0)]
    if failed:
        logs = [os.path.join(folder, f"{rank}.log") for rank in range(len(ranks))]
        crashed = any(_crashed_outside_python(p.exitcode, log) for p, log in zip(ranks, logs))
        kind = CrashedOutsidePython if crashed else AssertionError
        raise kind(f"rank(s) {failed} failed\n{_logs(folder)}")


def _crashed_outside_python(exitcode: int | None, log: str) -> bool:
    """faulthandler writes "Current thread" above the stack of the thread that crashed, if Python knows that thread."""
    if exitcode != -signal.SIGSEGV:
        return False
    with open(log, errors="replace") as f:
        text = f.read()
    return "Fatal Python error: Segmentation fault" in text and "Current thread" not in text


def _logs(folder: str) -> str:
    text = []
    for name in sorted(os.listdir(folder)):
        if name.endswith((".err", ".log")):
            with open(os.path.join(folder, name), errors="replace") as f:
                text.append(f"--- {name} ---\n" + f.read()[-6000:])
    return "\n".join(text)


def _child(function, args, rank: int, world_size: int, port: int, folder: str, interpret: bool, env: dict) -> None:
    log = open(os.path.join(folder, f"{rank}.log"), "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    import faulthandler

    faulthandler.enable(log)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        **env,
    )
    if not interpret:
        # The fork server imported Triton with the variable set (tests/conftest.py): Triton's own library must be.
        os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    try:
        result = function(*args)
        with open(os.path.join(folder, f"{rank}.result"), "wb") as f:
            pickle.dump(result, f)
    except BaseException:
        with open(os.path.join(folder, f"{rank}.err"), "w") as f:
            traceback.print_exc(file=f)
        sys.stderr.flush()
        os._exit(1)
    log.flush()
    if torch.distributed.is_initialized():
        try:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        except Exception:
            pass
    os._exit(0)
