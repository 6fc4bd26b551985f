"""Starts the doctor's ranks in processes of their own, with a time limit, and brings a rank's traceback back."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accel_moe

_OF_A_LAUNCH = ("ACCELERATE_", "ACCEL_MOE_", "FSDP_", "PARALLELISM_CONFIG_", "TORCHELASTIC_")
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")


def run_ranks(
    function: Callable[[Any, Path], None],
    argument: Any,
    folder: Path,
    *,
    ranks: int,
    device: str,
    timeout_s: float,
    **env: str,
) -> str | None:
    """Calls function(argument, folder) on `ranks` processes of this machine. Returns the failure in words, or None.

    Args:
        function: importable, from the package.
        device: "cuda", or "cpu", which hides the GPUs.
        env: more variables.
    """
    (folder / "request.pkl").write_bytes(pickle.dumps((function, argument)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    log = folder / "log.txt"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "-m", "accel_moe.diagnosis.rank", str(folder)],
            stdout=output,
            stderr=output,
            env=environment(device) | env,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"{_tail(log)}\nTimeoutError: still running after {timeout_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code == 0:
        return None
    told = sorted(folder.glob("rank*.err"), key=lambda path: path.stat().st_mtime)
    return told[0].read_text(encoding="utf-8") if told else f"{_tail(log)}\nexit code {code}"


def environment(device: str) -> dict[str, str]:
    """This process's environment without a launch's variables, and with this package on the path."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(_OF_A_LAUNCH) and n not in _OF_A_RANK}
    root = str(Path(accel_moe.__file__).parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [kept.get("PYTHONPATH"), root]))
    kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def last_line(failure: str) -> str:
    """A failure's last line that says something: of a traceback, the error."""
    return next((line.strip() for line in reversed(failure.splitlines()) if line.strip()), "no output")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]
