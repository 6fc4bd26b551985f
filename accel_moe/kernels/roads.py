"""Two roads for the GEMMs: gemm.py's kernels, which run everywhere, and those of hopper*.py for Hopper GPUs."""

import functools
import logging
import os
from typing import Any

import torch
import triton

from . import tuning
from .tuning import Config

logger = logging.getLogger(__name__)

# Triton's versions that Gluon's kernels were run with, on a GPU. Gluon is experimental: a later version may compile a
# kernel and mean something else by it.
RUN_WITH = ("3.6",)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def gluon_road() -> Any:
    """The module launch_hopper, or None: with SCATTERMOE_GLUON=0; where Triton is none of RUN_WITH, unless
    SCATTERMOE_GLUON=1 asks for it; and where Gluon is not here as it is used there.

    Raises:
        ValueError: SCATTERMOE_GLUON is something else.
    """
    asked = os.environ.get("SCATTERMOE_GLUON", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"SCATTERMOE_GLUON is {asked!r}: expected 0 or 1. Set one of them, or unset it.")
    known = triton.__version__.startswith(tuple(f"{version}." for version in RUN_WITH))
    if INTERPRETED or torch.version.hip or asked == "0" or not (known or asked):
        return None
    try:
        from . import launch_hopper
    except Exception as error:  # an experimental interface: names move between Triton's versions
        logger.warning("Gluon's kernels are not used: %s", error)
        return None
    return launch_hopper


_failed: set[tuple[str, Config]] = set()  # Gluon's kernels


def on_hopper(kernel: str, config: Config, runs: bool, *arguments: Any) -> bool:
    """The choice between the two roads: launches Gluon's kernel if `config` is one of its and it `runs` with these
    operands. Whether it did. While configurations are measured, raises what the launch raises."""
    road = gluon_road() if config.gluon and runs and (kernel, config) not in _failed else None
    if road is None:
        return False
    try:
        getattr(road, kernel)(*arguments, config)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if tuning.measuring():
            raise
        logger.warning("Gluon's %s does not run here with %s; Triton's is used: %s", kernel, config, error)
        _failed.add((kernel, config))
        return False
    return True
