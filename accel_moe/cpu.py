"""FSDP2 on a machine without an accelerator, over gloo: for laptops, tutorials and tests.

accelerate refuses FSDP on the CPU, although PyTorch supports it. `enable()` lifts the refusal:

    import accel_moe.cpu
    accel_moe.cpu.enable()      # before Accelerator() or Trainer; does nothing on a machine with a GPU
"""

from __future__ import annotations

import atexit
import os
import time

import torch

from accel_moe import long_context
from accel_moe.patching import ACCELERATE, install, patch, patches_of


def has_accelerator() -> bool:
    """Whether there is a device that FSDP can use. Apple's MPS has no collectives: such a machine runs on its CPU."""
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != "mps"


def enable() -> bool:
    """Let accelerate run FSDP2 with gloo ranks on the CPU. Not a collective; call it on every rank, before the
    Accelerator is made.

    Returns:
        True if FSDP2 on the CPU is on. False on a machine with an accelerator and outside a distributed launch.
    """
    if has_accelerator() or int(os.environ.get("LOCAL_RANK", -1)) == -1:
        return False
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    install(patches_of(_prepare_backend, long_context.maybe_context_parallel))
    # gloo's threads drop the last collective's tensors a moment after it returned, and abort the process if the
    # interpreter is already shutting down (https://github.com/pytorch/pytorch/pull/179291), so exit waits a moment
    atexit.register(time.sleep, 0.1)
    return True


@patch(
    "accelerate.state.PartialState._prepare_backend",
    why="accelerate ties FSDP to a GPU backend; FSDP2 itself runs on gloo.",
    tested=ACCELERATE,
)
def _prepare_backend(original, self, cpu=False, sagemaker_dp=False, backend=None):
    from accelerate.utils import DistributedType

    launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
    if launched and not cpu and not sagemaker_dp and not has_accelerator():
        return "gloo", DistributedType.MULTI_GPU
    return original(self, cpu, sagemaker_dp, backend)
