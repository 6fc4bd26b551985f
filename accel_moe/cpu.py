"""FSDP2 on a machine without an accelerator, over gloo: for laptops, tutorials and tests.

accelerate refuses FSDP on the CPU, although PyTorch supports it. `enable()` lifts the refusal:

    import accel_moe.cpu
    accel_moe.cpu.enable()      # before Accelerator() or Trainer; does nothing on a machine with a GPU
"""

from __future__ import annotations

import atexit
import os
import time

from accel_moe import hooks


def enable() -> bool:
    """Let accelerate run FSDP2 with gloo ranks on the CPU. Not a collective; call it on every rank, before the
    Accelerator is made.

    Returns:
        True if FSDP2 on the CPU is on. False on a machine with an accelerator and outside a distributed launch.
    """
    if hooks.has_accelerator() or int(os.environ.get("LOCAL_RANK", -1)) == -1:
        return False
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    hooks.install_cpu()
    # gloo's threads drop the last collective's tensors a moment after it returned, and abort the process if the
    # interpreter is already shutting down (https://github.com/pytorch/pytorch/pull/179291), so exit waits a moment
    atexit.register(time.sleep, 0.1)
    return True
