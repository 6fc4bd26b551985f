"""A load reads the folder that was verified: DCP's values into the shards, and a warning of what nobody can restore.

verify.py checks the folder before the model is touched. for_accelerate.py and for_trainer.py call this file. resume.py
says which folder is the newest.

With another world size, the state of one rank cannot be restored for all of them (RNG, the position of a dataloader
without state): one warning says so. The learning-rate schedule keeps its position: accelerate steps it once per
process, so it counts batches of data, and resumes at the same amount of data seen.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dist_cp

from accel_moe import ranks
from accel_moe.checkpoint.dcp_read import FolderReader
from accel_moe.checkpoint.manifest import Manifest
from accel_moe.checkpoint.verify import Verified, read_checked

_loading: Verified | None = None  # load_state's, while it runs
_model_loaded: Verified | None = None  # Trainer's: the model was loaded from it, and the optimizer may follow


@contextmanager
def loading_from(verified: Verified) -> Iterator[None]:
    """Around load_state: the model and the optimizer inside are not verified again."""
    global _loading
    _loading = verified
    try:
        yield
    finally:
        _loading = None


def under_way() -> Verified | None:
    """The folder that `loading_from` is inside of, or None."""
    return _loading


def remember(verified: Verified | None) -> None:
    """Keeps the folder between the two calls in which Trainer loads model and optimizer. None forgets it."""
    global _model_loaded
    _model_loaded = verified


def remembered(folder: Path) -> Verified | None:
    """The folder that the model was loaded from just now, if it is this one."""
    return _model_loaded if _model_loaded is not None and _model_loaded.folder == folder else None


def still_verified(folder: Path) -> Verified | None:
    """`remembered(folder)`, if every rank has it and no file changed since. A collective."""
    found = remembered(folder)
    if not all(ranks.gather(found is not None)):
        return None
    assert found is not None
    return found if found.still_holds() else None


def checked_metadata(folder: Path, dcp_folder: str, manifest: Manifest | None) -> Any:
    """`read_checked` on every rank. A collective. Raises CheckpointError on every rank."""
    return ranks.run_or_raise_everywhere(f"loading {folder}", lambda: read_checked(folder, dcp_folder, manifest))


def read_dcp(folder: Path, dcp_folder: str, state: dict[str, Any], manifest: Manifest | None) -> None:
    """Reads into the state's tensors, in place, from a folder that `checked_metadata` has looked at. A collective.
    Raises CheckpointError on every rank."""

    def load() -> None:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dist_cp.load(
                state,
                storage_reader=FolderReader([folder / dcp_folder], manifest),
                planner=dist_cp.DefaultLoadPlanner(),
                process_group=ranks.group(),
                no_dist=not ranks.distributed(),
            )

    ranks.run_or_raise_everywhere(f"loading {folder}", load)


def tell_what_is_lost(folder: Path, manifest: Manifest | None) -> None:
    """Warns on rank 0 when the world has another size: state of single ranks could not be restored."""
    if manifest is not None:
        before = manifest.world_size
    else:
        before = sum(
            re.fullmatch(r"random_states_\d+\.pkl|rng_state_\d+\.pth", path.name) is not None
            for path in folder.iterdir()
        )
    now = ranks.world_size()
    if before in (0, now) or not ranks.is_rank0():
        return
    lost = "the random state of the new ranks" if now > before else "the random state of the ranks that are gone"
    warnings.warn(
        f"{folder.name} was saved by {before} ranks and is loaded by {now}. Weights and optimizer are restored "
        f"exactly. Not restored: {lost}, and the position of the dataloader within the epoch, unless it keeps its own "
        "state (use_stateful_dataloader). The learning-rate schedule goes on after the same number of batches over all "
        "ranks.",
        stacklevel=4,
    )
