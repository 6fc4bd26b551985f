"""Which functions of accelerate, transformers and PEFT are replaced, and when.

Each patch stands beside the code that it calls, and is on a leash (patching.py). This file collects them. Importing it
patches nothing: `prepare()` calls `install()`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from accel_moe import (
    cpu,
    dtype_units,
    in_accelerator,
    long_context,
    patching,
    positions,
    ranks,
    recompute,
    shard,
    supported,
    trainer_parts,
    whereabouts,
)
from accel_moe.checkpoint import background, for_accelerate, for_trainer
from accel_moe.experts import adapters, pack
from accel_moe.monitoring import callback
from accel_moe.patching import patches_of
from accel_moe.weights import adapters_on_meta, plan

logger = logging.getLogger("accel_moe")

TABLE = (
    *patches_of(in_accelerator, dtype_units, shard, recompute, positions, whereabouts, long_context, trainer_parts),
    *patches_of(for_accelerate, background, for_trainer, callback),
)
PEFT_TABLE = patches_of(adapters)
"""In place where PEFT was imported."""
WAITING_TABLE = patches_of(adapters_on_meta)
"""In place where PEFT is installed, from the first from_pretrained on that leaves its weights in the files."""
PACKING_TABLE = patches_of(pack)
"""In place under an old torch, once experts are packed."""
CPU_TABLE = patches_of(cpu)
"""`accel_moe.cpu.enable()` installs it."""
LOAD_TABLE = patches_of(plan)
"""In place only while from_pretrained runs."""

_ALL = (*TABLE, *PEFT_TABLE, *WAITING_TABLE, *PACKING_TABLE, *CPU_TABLE, *LOAD_TABLE)


def install() -> None:
    """Put every patch of TABLE in place; a second call changes nothing. Warns once of versions that were not tested.

    Raises:
        RuntimeError: a target is gone or takes other parameters than it did in the tested versions. No patch is in
            place then.
    """
    patching.install(TABLE)
    adapters.patch_peft()
    _warn_of_untested_versions()


@contextmanager
def planning_loads() -> Iterator[None]:
    """Within it, from_pretrained leaves its model on meta, with a load plan."""
    adapters_on_meta.keep_adapters_real()
    try:
        patching.install(LOAD_TABLE)
        yield
    finally:
        patching.uninstall(LOAD_TABLE)


def uninstall() -> None:
    """Undo every patch, newest first."""
    patching.uninstall((*_ALL, *long_context.BALANCING.values()))


def installed() -> list[str]:
    """The targets that are replaced now."""
    return [patch.target for patch in _ALL if patching.is_installed(patch)]


@functools.cache
def _warn_of_untested_versions() -> None:
    if ranks.is_rank0() and (message := supported.warning()) is not None:
        logger.warning(message)
