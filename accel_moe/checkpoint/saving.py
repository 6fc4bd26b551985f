"""One save is one commit: model, optimizer, scheduler, RNG, dataloader and custom states appear together or not at all.

accelerate and Trainer decide what belongs to a checkpoint; they keep doing so. Around them:

    1. begin     what others left is finished or removed; a fresh folder, on each disk that the ranks write to
    2. fill      the original save runs, into that folder. Its FSDP model and optimizer go through DCP with checksums
    3. seal      every other file is hashed and made durable; the manifest is written last
    4. commit    when all disks have sealed, the folder gets its name (transaction.py); then the oldest one is deleted

With `moe_async_save` step 2 only copies the tensors to (pinned) host memory. The DCP writing and steps 3 and 4 then run
in a thread, over a gloo group of their own (background.py).

A failure that one rank sees is raised on every rank (ranks.py), and the folder keeps its temporary name.

for_accelerate.py and for_trainer.py call this file.

Ideas: torchtitan's checkpoint.py (staging, then save in the background, one purge after the save), and the two-phase
layout of "write beside, rename over".
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata as installed
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dist_cp
from torch.distributed.tensor import DTensor

from accel_moe import ranks
from accel_moe.checkpoint import background, folders, node_local, transaction
from accel_moe.checkpoint.adapter_run import describe_adapter
from accel_moe.checkpoint.advice import run_advised
from accel_moe.checkpoint.checksums import ALGORITHM, file_digest, hashing_pool
from accel_moe.checkpoint.dcp_metadata import METADATA_NAME, check_metadata, tensors_of
from accel_moe.checkpoint.dcp_read import FolderReader
from accel_moe.checkpoint.dcp_write import COPY_AHEAD_BYTES, ChecksumWriter
from accel_moe.checkpoint.durable import fsync_folder, fsync_path
from accel_moe.checkpoint.manifest import AdapterEntry, FileEntry, Manifest, Quantisation, write_manifest
from accel_moe.checkpoint.node_local import Disks, NodePlanner
from accel_moe.errors import CheckpointError
from accel_moe.experts.packing import BLOCK
from accel_moe.experts.state import prepared_state

T = TypeVar("T")
_VERSIONED = ("accel_moe", "torch", "accelerate", "transformers")


# --- what is being saved -------------------------------------------------------------------------------------------


@dataclass
class Save:
    """A save under way. The original save fills `work`, a folder inside `staging`.

    It becomes `final`, which is `named` with symlinks followed. Paths are this rank's own: with node-local disks they
    may differ between ranks. The leader of a disk holds the folder's lock (`held`), seals it and commits it.
    """

    named: Path
    final: Path
    staging: Path
    work: Path
    held: int | None
    models: list[Any]
    background: bool
    disks: Disks
    step: int | None = None
    keep: int | None = None
    prefix: str | None = None
    protected: list[Path] = field(default_factory=list)
    writes: list[Callable[[], None]] = field(default_factory=list)
    entries: dict[str, FileEntry] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    node_metadata: dict[str, dict[int, bytes]] = field(default_factory=dict)
    after_commit: list[Callable[[], None]] = field(default_factory=list)
    adapter: AdapterEntry | None = None
    must_stay: bool = False  # what was written counts, or may come to count

    def run(self, what: str, step: Callable[[], T]) -> T:
        """Runs a step of the save; its failure on one rank is raised on every rank. A collective."""
        return run_advised(self.final, what, step)

    def run_on_leaders(self, what: str, step: Callable[[], None]) -> None:
        """The same, of a step that the leader of each disk makes."""
        self.run(what, lambda: step() if self.disks.leads else None)


_active: Save | None = None
_buffers: dict[str, torch.Tensor] = {}


def prepared_models(models: Iterable[Any]) -> list[Any]:
    """Those of `models` that accel_moe prepared."""
    return [model for model in models if state_of(model) is not None]


def state_of(model: Any) -> Any:
    """The PreparedState of a model, however it was wrapped since, or None."""
    return getattr(model, "_accel_moe", None) or prepared_state(model)


def option(models: Sequence[Any], name: str) -> Any:
    return getattr(state_of(models[0]).config, name)


def quantisation_of(models: Iterable[Any]) -> Quantisation | None:
    """How the experts of the first of `models` that packs them are packed, or None."""
    schemes = (getattr(state_of(model), "quantize", None) for model in models)
    scheme = next(filter(None, schemes), None)
    return None if scheme is None else Quantisation(scheme, BLOCK)


# --- 1. begin ------------------------------------------------------------------------------------------------------


def begin(named: str | os.PathLike, models: list[Any]) -> Save:
    """Makes the folder to fill. A collective of all ranks. Raises CheckpointError on every rank.

    First it finishes the commits that were cut short, and removes what is left of dead saves, so that a job that
    crashes again and again does not fill the disk.
    """
    named = transaction.absolute(named)
    final = transaction.resolved(named)
    folders.release_all()  # the caller waited for the last save; an interrupt may have left one behind
    run_advised(final, f"saving {named}", lambda: _refuse_a_file(final))
    node_local.recover_everywhere(final, final.parent)
    acts = node_local.acts_for(final)
    run_advised(final, f"cleaning {final.parent}", lambda: acts and folders.clean_abandoned(final.parent, final))
    adapter = describe_adapter(models)
    disks, work, held = node_local.create_on_every_disk(named, final)
    return Save(
        named=named,
        final=final,
        staging=work.parent,
        work=work,
        held=held,
        models=models,
        background=bool(option(models, "moe_async_save")),
        disks=disks,
        adapter=adapter,
    )


def _refuse_a_file(final: Path) -> None:
    if final.exists() and not final.is_dir():
        raise CheckpointError(f"{final} is a file, expected a folder or nothing. Save under another name.")


# --- 2. fill -------------------------------------------------------------------------------------------------------


def fill(save: Save, original: Callable[[], Any]) -> None:
    """Runs the original save with `save` in force. What a rank raises there is raised on all."""
    global _active
    assert _active is None, "a save inside a save"
    _active = save
    try:
        save.run(f"saving {save.named}", original)
    except Exception:
        _discard(save)
        raise
    finally:
        _active = None


def under_way() -> Save | None:
    """The save that `fill` is inside of, or None."""
    return _active


def _discard(save: Save) -> None:
    """Removes what a failed save wrote, so that it does not fill the disk. Best effort; never hides the failure.

    What was sealed stays when another node may have committed its part.
    """
    if save.disks.leads and not save.must_stay:
        transaction.discard(save.work, save.staging)
    _let_go(save)


def write_dcp(save: Save, folder: str, state_dict: dict[str, Any]) -> None:
    """Saves a state dict of DTensors under `folder` of the checkpoint: at once, or staged for the background.

    A collective of all ranks, now or in the background thread.
    """
    if save.background:
        state_dict = _stage(folder, state_dict)
        save.writes.append(lambda: _write_dcp(save, folder, state_dict))
    else:
        _write_dcp(save, folder, state_dict)


def _write_dcp(save: Save, folder: str, state_dict: dict[str, Any]) -> None:
    with hashing_pool() as pool:
        # staged tensors are in host memory: no copying ahead, and no CUDA stream in the background thread
        copy_ahead_bytes = 0 if save.background else COPY_AHEAD_BYTES
        writer = ChecksumWriter(save.work / folder, pool, save.disks.leaders, copy_ahead_bytes)

        def write() -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                save.metadata[folder] = dist_cp.save(
                    state_dict,
                    storage_writer=writer,
                    planner=dist_cp.DefaultSavePlanner() if save.disks.is_one else NodePlanner(save.disks.leaders),
                    process_group=ranks.group(),
                    no_dist=not ranks.distributed(),
                )

        save.run(f"saving {save.named}", write)
    save.node_metadata[folder] = writer.node_metadata
    save.entries |= {f"{folder}/{name}": entry for name, entry in writer.file_entries().items()}


def _stage(folder: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy in host memory, pinned where there is a GPU. The next save, which waits for this one, reuses the buffers.

    PyTorch's DefaultStager would do, but it closes itself after one state dict (2.11): model and optimizer are two.
    """
    staged = _host_copy(state_dict, folder)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # host sync: the copies above run on the current stream
    return staged


def _host_copy(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _host_copy(inner, f"{path}/{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_host_copy(inner, f"{path}/{i}") for i, inner in enumerate(value))
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    local = (value.to_local() if isinstance(value, DTensor) else value).detach()
    buffer = _buffers.get(path)
    if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
        buffer = _buffers[path] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
    buffer.copy_(local, non_blocking=True)
    # from_local() would move the buffer back to the mesh's device
    return DTensor(buffer, value._spec, requires_grad=False) if isinstance(value, DTensor) else buffer


# --- 3. seal and 4. commit -----------------------------------------------------------------------------------------


def finish(save: Save) -> None:
    """Seals and commits what was filled. A collective of all ranks; in the background thread when it is async.

    Raises CheckpointError on every rank, and removes what was written, when any of it fails.
    """
    try:
        _seal_and_commit(save)
    except Exception:
        _discard(save)
        raise


def _seal_and_commit(save: Save) -> None:
    for write in save.writes:
        write()
    save.writes.clear()
    saving = f"saving {save.named}"
    if not save.disks.is_one:
        save.run(saving, node_local.metadata_of_other_nodes(save.disks, save.work, save.node_metadata))
    manifest = _seal(save)

    def write_it() -> None:
        write_manifest(save.work, replace(manifest, node=save.disks.distinct.index(ranks.rank())))

    def prepare() -> None:
        save.work = transaction.prepare(save.work, save.final)

    def commit() -> None:
        save.must_stay = not save.disks.is_one  # another node may have committed, and recovers with this one
        save.work = transaction.commit(save.work, save.final)
        save.must_stay = True
        _let_go(save)

    def tidy() -> None:
        if save.disks.leads:
            if save.prefix is not None:
                folders.rotate(save.final.parent, save.prefix, save.keep, save.final, save.protected)
            folders.clean_abandoned(save.final.parent, save.final)
        for act in save.after_commit:
            act()

    save.run_on_leaders(saving, write_it)
    save.run_on_leaders(saving, prepare)  # from here on every disk has a sealed folder
    save.run_on_leaders(f"committing {save.named}", commit)
    move = partial(transaction.move_into_place, save.work, save.final, save.staging)
    save.run_on_leaders(f"moving the files of {save.named} (which is committed) into place", move)
    save.run(f"tidying up after {save.named} (which is committed)", tidy)


def _let_go(save: Save) -> None:
    if save.held is not None:
        folders.release(save.held)
        save.held = None


def _seal(save: Save) -> Manifest:
    """Hashes and syncs the files that DCP did not write; returns the manifest, the same everywhere. A collective."""
    entries = ranks.gather(save.entries)
    known: dict[int, dict[str, FileEntry]] = {leader: {} for leader in save.disks.leaders}
    for r, written in enumerate(entries):
        known[save.disks.leaders[r]] |= written

    def seal_rest() -> dict[str, FileEntry]:
        if not save.disks.leads:
            return {}
        mine = known[ranks.rank()]
        return mine | _hash_rest(save.work, set(mine))

    sealed = ranks.gather(save.run(f"saving {save.named}", seal_rest))
    leaders = save.disks.distinct

    def describe() -> Manifest | None:
        if ranks.rank() != 0:
            return None
        # what accelerate wrote with DCP itself (PEFT's adapters alone) is described like the rest
        for path in save.work.glob(f"*/{METADATA_NAME}"):
            if path.parent.name not in save.metadata:
                save.metadata[path.parent.name] = FolderReader([path.parent]).read_metadata()
        for folder, metadata in save.metadata.items():
            if problems := check_metadata(metadata):
                raise CheckpointError(f"DCP planned an incomplete {folder}: {problems[0]}. Please report this.")
        state = state_of(save.models[0])
        plan = getattr(state, "mesh_plan", None)
        return Manifest(
            step=save.step,
            base_model=getattr(state, "base_model", None),
            model_type=getattr(state, "model_type", None),
            ep=getattr(plan, "ep", 1),
            efsdp=getattr(plan, "efsdp", 1),
            dp_replicate=getattr(plan, "dp_replicate", 1),
            world_size=ranks.world_size(),
            versions={name: _version(name) for name in _VERSIONED},
            digest_algorithm=ALGORITHM,
            nodes=tuple(hosts[leader] for leader in leaders),
            files=tuple(sealed[leader] for leader in leaders),
            tensors={folder: tensors_of(metadata) for folder, metadata in save.metadata.items()},
            quantised_experts=quantisation_of(save.models),
            adapter=save.adapter,
        )

    hosts = ranks.gather(ranks.host())
    return ranks.from_rank0(save.run(f"saving {save.named}", describe))  # type: ignore[return-value]


def _hash_rest(root: Path, known: set[str]) -> dict[str, FileEntry]:
    """Checksums of the files that DCP's writer did not hash, each made durable."""
    rest = {}
    with hashing_pool() as pool:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            name = path.relative_to(root).as_posix()
            if name in known or folders.is_internal(path):
                continue
            fsync_path(path)
            rest[name] = FileEntry(path.stat().st_size, file_digest(path, ALGORITHM, pool))
    for folder in [root, *(p for p in root.rglob("*") if p.is_dir())]:
        fsync_folder(folder)
    return rest


def _version(name: str) -> str:
    if name in sys.modules and hasattr(sys.modules[name], "__version__"):
        return str(sys.modules[name].__version__)
    try:
        return installed.version(name)
    except installed.PackageNotFoundError:
        return "unknown"


def complete(save: Save) -> None:
    """Finishes a filled save, here or in the background."""
    if save.background:
        background.start(lambda: finish(save), save.models)
    else:
        finish(save)
