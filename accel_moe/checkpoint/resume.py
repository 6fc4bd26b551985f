"""Which checkpoint a run resumes from: the newest that is whole, on every rank's disk.

A folder with a manifest is whole: its save committed it. One without was written by stock accelerate or Trainer, or
never finished; it counts as whole when it has what those write last, and a metadata file in each DCP folder. The
highest number wins, of either kind; what is passed over is named, with the reason.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accel_moe import ranks
from accel_moe.checkpoint import folders, node_local, transaction
from accel_moe.checkpoint.dcp_metadata import MANIFEST_MARK, METADATA_NAME
from accel_moe.errors import CheckpointError
from accel_moe.whereabouts import listed

OURS, STOCK = "ours", "stock"


def standing(folder: Path) -> str:
    """OURS, STOCK, or why the folder is not a whole checkpoint."""
    if folders.is_committed(folder):
        return OURS
    missing = "has no manifest"
    metadata = [path / METADATA_NAME for path in sorted(folder.iterdir()) if path.is_dir() and _is_dcp(path)]
    for path in metadata:
        try:
            content = path.read_bytes()
        except OSError:
            content = b""
        if not content:
            return f"{missing}, and {path.parent.name}/{METADATA_NAME} is missing: its save never finished"
        if MANIFEST_MARK.encode() in content:
            return f"{missing}, which was written with it: the copy is incomplete"
    if not metadata and not any(folder.glob("pytorch_model*")) and not any(folder.glob("*.safetensors*")):
        return f"{missing}, and no weights either"
    last = "trainer_state.json" if folder.name.startswith("checkpoint-") else "random_states_0.pkl"
    if not _readable(folder / last):
        return (
            f"{missing}, and {last}, which stock {'Trainer' if last.endswith('json') else 'accelerate'} writes "
            "last, is missing or damaged"
        )
    return STOCK


def _is_dcp(folder: Path) -> bool:
    return folder.name.startswith(("pytorch_model_fsdp_", "optimizer_"))


def _readable(path: Path) -> bool:
    try:
        return path.stat().st_size > 0 and (path.suffix != ".json" or isinstance(json.loads(path.read_bytes()), dict))
    except (OSError, ValueError, RecursionError):
        return False


def newest_whole(parent: Path, prefix: str, gather: Callable[[Any], list[Any]]) -> Path | None:
    """The newest checkpoint that is whole on every disk that `gather` hears of; None when there is none.

    Warns, on rank 0, of what was passed over and of a stock checkpoint that is newer than all of ours. With
    `ranks.gather` a collective.
    """
    here = {path.name: standing(path) for path in folders.numbered(parent, prefix)}
    everyone = gather(here)
    kinds = {name: [other.get(name, "is not on this disk") for other in everyone] for name in here}
    names = sorted(here, key=lambda name: int(name.removeprefix(prefix)), reverse=True)
    passed_over = [f"{path.name} was never finished" for path in folders.unfinished(parent)]
    for name in names:
        bad = [r for r, kind in enumerate(kinds[name]) if kind not in (OURS, STOCK)]
        if bad or len(set(kinds[name])) > 1:
            where = f" on {listed(bad)}" if bad and len(bad) < len(everyone) else ""
            why = kinds[name][bad[0]] if bad else "has a manifest on some ranks only"
            passed_over.append(f"{name}{where} {why}")
            continue
        older = next((other for other in names[names.index(name) + 1 :] if here[other] == OURS), None)
        newer_stock = here[name] == STOCK and older is not None
        if (passed_over or newer_stock) and ranks.is_rank0():
            why = f" It has no manifest (stock accelerate wrote it), and is newer than {older}." if newer_stock else ""
            told = f" Passed over: {'; '.join(passed_over)}." if passed_over else ""
            warnings.warn(f"resuming from {name}.{why}{told}", stacklevel=5)
        return parent / name
    return None


def newest_checkpoint(run: str | os.PathLike, prefix: str = "checkpoint-") -> Path:
    """The newest checkpoint of a run that is whole on every rank's disk: the one that Trainer resumes from.

    A collective: all ranks call it, once the process group is there. Warns of the newer ones that it passes over.

    Args:
        run: the folder that holds the checkpoints.
        prefix: of their names, before the number of the step.

    Raises:
        CheckpointError: there is none, on every rank. A subclass of ValueError.
    """
    parent = Path(run)
    node_local.recover_everywhere(None, transaction.resolved(parent))
    newest = newest_whole(parent, prefix, ranks.gather)
    if newest is not None:
        return newest
    names = [path.name for path in (*folders.unfinished(parent), *reversed(folders.numbered(parent, prefix)))]
    raise CheckpointError(
        f"{parent} has no finished checkpoint: expected folders {prefix}<number>, found "
        f"{', '.join(names) or 'nothing'}. Start without resuming."
    )


def all_resume_newest(resume: Any, run: Path) -> bool:
    """Whether every rank asks for the newest checkpoint of `run`, in which a commit that was cut short is finished.

    Raises on every rank when they ask for different kinds.
    """
    asked = "a folder" if isinstance(resume, str | os.PathLike) else repr(bool(resume))
    told = ranks.gather(asked)
    if len(set(told)) > 1:
        groups = [f"{listed([r for r, t in enumerate(told) if t == kind])}: {kind}" for kind in dict.fromkeys(told)]
        raise CheckpointError(
            f"train(resume_from_checkpoint=...) differs between ranks ({'; '.join(groups)}): some would start anew. "
            "Pass True, which takes the newest checkpoint that all have, or one folder on every rank."
        )
    if asked == "a folder":
        node_local.recover_everywhere(transaction.resolved(resume))

        def look() -> None:
            folder = transaction.absolute(resume)
            if not folder.is_dir():
                raise CheckpointError(f"{folder} is not a folder. Give the folder that save_state or Trainer wrote.")

        ranks.run_or_raise_everywhere(f"looking for {resume}", look)
    elif asked == "True":
        node_local.recover_everywhere(None, transaction.resolved(run))
    return asked == "True"
