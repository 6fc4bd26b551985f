"""Two roads for the GEMMs: gemm.py's kernels, which run everywhere, and those of hopper*.py for Hopper GPUs."""

import functools
import logging
import os
from typing import Any

import torch
import triton

from .tuning import Config

logger = logging.getLogger(__name__)

# Triton's versions that Gluon's kernels were run with, on a GPU. Gluon is experimental: a later version may compile a
# kernel and mean something else by it.
RUN_WITH = ("3.6",)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def gluon_road() -> Any:
    """The module launch_hopper. None: Triton is none of RUN_WITH, or Gluon is not here as it is used there.

    SCATTERMOE_GLUON=1 asks for it with any version, SCATTERMOE_GLUON=0 with none.
    """
    known = triton.__version__.startswith(tuple(f"{version}." for version in RUN_WITH))
    if INTERPRETED or os.environ.get("SCATTERMOE_GLUON", "1" if known else "0") != "1":
        return None
    try:
        from . import launch_hopper
    except Exception as error:  # an experimental interface: names move between Triton's versions
        logger.info("Gluon's kernels are not used: %s", error)
        return None
    return launch_hopper


_did_not_compile: set[str] = set()  # Gluon's kernels


def on_hopper(kernel: str, config: Config, runs: bool, *arguments: Any) -> bool:
    """The choice between the two roads: launches Gluon's kernel if `config` is one of its and it `runs` with these
    operands. Whether it did."""
    road = gluon_road() if config.gluon and runs and kernel not in _did_not_compile else None
    if road is None:
        return False
    try:
        getattr(road, kernel)(*arguments, config)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.info("Gluon's %s does not compile here; Triton's is used: %s", kernel, error)
        _did_not_compile.add(kernel)
        return False
    return True
