"""One save is one commit: model, optimizer, scheduler, RNG, dataloader and custom states appear together or
not at all.

accelerate and Trainer decide what belongs to a checkpoint; they keep doing so. Around them:

    1. begin     what others left is finished or removed; a fresh folder, on each disk that the ranks write to
    2. fill      the original save runs, into that folder. Its FSDP model and optimizer go through DCP with checksums
    3. seal      every other file is hashed and made durable; the manifest is written last
    4. commit    when all disks have sealed, the folder gets its name (transaction.py); then the oldest one is deleted

With `moe_async_save` step 2 only copies the tensors to (pinned) host memory, and the DCP writing and steps 3
and 4 run in a thread, over a gloo group of their own (background.py).

A failure that one rank sees is raised on every rank (ranks.py), and the folder keeps its temporary name.

The wrapper makers below change nothing for a model that accel_moe did not prepare. hooks.py installs them.

Ideas: torchtitan's checkpoint.py (staging, then save in the background, one purge after the save), the
two-phase layout of "write beside, rename over".
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata as installed
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dist_cp
from torch.distributed.tensor import DTensor

from accel_moe import ranks
from accel_moe.checkpoint import background, folders, transaction
from accel_moe.checkpoint.advice import told_with_a_mend
from accel_moe.checkpoint.background import ends_before_sigterm, wait_for_background
from accel_moe.checkpoint.checksums import ALGORITHM, file_digest, hashing_pool
from accel_moe.checkpoint.dcp_metadata import METADATA_NAME, MODEL_FOLDER, OPTIMIZER_FOLDER, check_metadata, tensors_of
from accel_moe.checkpoint.dcp_read import FolderReader
from accel_moe.checkpoint.dcp_write import COPY_AHEAD_BYTES, ChecksumWriter, NodePlanner
from accel_moe.checkpoint.durable import fsync_folder, fsync_path
from accel_moe.checkpoint.manifest import FileEntry, Manifest, write_manifest
from accel_moe.errors import CheckpointError
from accel_moe.experts.state import prepared_state
from accel_moe.whereabouts import meet

T = TypeVar("T")
_VERSIONED = ("accel_moe", "torch", "accelerate", "transformers")


# --- what is being saved
# -----------------------------------------------------------------------------------------


@dataclass
class Save:
    """A save under way. `work`, a folder inside `staging`, is what the original save is told to fill.

    It becomes `final`, which is `named` with symlinks followed. Paths are this rank's own: with node-local disks they
    may differ between ranks. `leaders[r]` is the rank that made the folder which rank r writes to; a leader holds its
    lock (`held`), seals it and commits it.
    """

    named: Path
    final: Path
    staging: Path
    work: Path
    held: int | None
    models: list[Any]
    background: bool
    leaders: list[int]
    step: int | None = None
    keep: int | None = None
    prefix: str | None = None
    protected: list[Path] = field(default_factory=list)
    writes: list[Callable[[], None]] = field(default_factory=list)
    entries: dict[str, FileEntry] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    node_metadata: dict[str, dict[int, bytes]] = field(default_factory=dict)
    after_commit: list[Callable[[], None]] = field(default_factory=list)
    must_stay: bool = False  # what was written counts, or may come to count
    algorithm: str = ALGORITHM

    @property
    def is_leader(self) -> bool:
        return self.leaders[ranks.rank()] == ranks.rank()


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


# --- 1. begin
# ----------------------------------------------------------------------------------------------------


def begin(named: str | os.PathLike, models: list[Any]) -> Save:
    """Makes the folder to fill. A collective of all ranks. Raises CheckpointError on every rank.

    First it finishes the commits that were cut short, and removes what is left of dead saves, so that a job that
    crashes again and again does not fill the disk.
    """
    named = Path(os.path.abspath(os.path.expanduser(named)))
    final = transaction.resolved(named)
    folders.release_all()  # the caller waited for the last save; an interrupt may have left one behind
    _step(named, f"saving {named}", lambda: _refuse_a_file(final))
    transaction.recover_everywhere(final, final.parent)
    acts = transaction.acts_for(final)
    _step(named, f"cleaning {final.parent}", lambda: acts and folders.clean_abandoned(final.parent, final))
    leaders, work, held = _create_on_every_disk(named, final)
    return Save(
        named=named,
        final=final,
        staging=work.parent,
        work=work,
        held=held,
        models=models,
        background=bool(option(models, "moe_async_save")),
        leaders=leaders,
    )


def _step(named: Path, what: str, step: Callable[[], T]) -> T:
    """ranks.together, with a word of advice when the operating system refuses. A collective."""

    def advised() -> T:
        with told_with_a_mend(transaction.resolved(named)):
            return step()

    return ranks.together(what, advised)


def _refuse_a_file(final: Path) -> None:
    if final.exists() and not final.is_dir():
        raise CheckpointError(f"{final} is a file, expected a folder or nothing. Save under another name.")


def _create_on_every_disk(named: Path, final: Path) -> tuple[list[int], Path, int | None]:
    """Creates the folder once on each disk that some rank writes to. A collective.

    Returns each rank's leader, the folder to fill, and the lock, which only leaders have. Rank 0 creates it; ranks
    that do not see it write elsewhere, and the lowest of them creates it there; and so on. With a shared disk that is
    one round. A folder that exists is not left: the new files are prepared inside it.
    """
    save_id = ranks.from_rank0(folders.new_save_id())
    leaders: list[int | None] = [None] * ranks.world_size()
    mine, held = final, None
    while None in leaders:
        leader = leaders.index(None)

        def create(leader: int = leader) -> tuple[bool, int | None]:
            if ranks.rank() != leader:
                return False, None
            inside = final.is_dir()
            staging = folders.staging_name(final, save_id, inside=inside)
            lock = folders.create_staging(staging)
            (staging / (named.name or "root")).mkdir()
            return inside, lock

        made = _step(named, f"saving {named}", create)
        held = made[1] if made[1] is not None else held
        staging = folders.staging_name(final, save_id, inside=ranks.gather(made[0])[leader])
        sees = ranks.gather(staging.is_dir())
        if sees[ranks.rank()] and leaders[ranks.rank()] is None:
            mine = staging / (named.name or "root")
        leaders = [leader if there and known is None else known for there, known in zip(sees, leaders, strict=True)]
    return [leader for leader in ranks.from_rank0(leaders) if leader is not None], mine, held


# --- 2. fill
# -----------------------------------------------------------------------------------------------------


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
        writer = ChecksumWriter(save.work / folder, save.algorithm, pool, save.leaders, copy_ahead_bytes)
        one_disk = len(set(save.leaders)) == 1

        def write() -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                save.metadata[folder] = dist_cp.save(
                    state_dict,
                    storage_writer=writer,
                    planner=dist_cp.DefaultSavePlanner() if one_disk else NodePlanner(save.leaders),
                    process_group=ranks.group(),
                    no_dist=not ranks.distributed(),
                )

        _step(save.named, f"saving {save.named}", write)
    save.node_metadata[folder] = writer.node_metadata
    save.entries |= {f"{folder}/{name}": entry for name, entry in writer.file_entries().items()}


def _stage(folder: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy in host memory, pinned where there is a GPU; the buffers are kept and reused by the next save, which
    waits for this one.

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


# --- 3. seal and 4. commit
# ---------------------------------------------------------------------------------------


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
    _share_metadata(save)
    manifest = _seal(save)
    what = f"saving {save.named}"

    def write_it() -> None:
        if save.is_leader:
            node = sorted(set(save.leaders)).index(ranks.rank())
            write_manifest(save.work, Manifest(**{**vars(manifest), "node": node}))

    def prepare() -> None:
        if save.is_leader:
            save.work = transaction.prepare(save.work, save.final)

    def commit() -> None:
        if save.is_leader:
            save.must_stay = len(set(save.leaders)) > 1  # another node may have committed, and recovers with this one
            save.work = transaction.commit(save.work, save.final)
            save.must_stay = True
            _let_go(save)

    def move() -> None:
        if save.is_leader:
            transaction.move_into_place(save.work, save.final, save.staging)

    def tidy() -> None:
        if save.is_leader:
            if save.prefix is not None:
                folders.rotate(save.final.parent, save.prefix, save.keep, save.final, save.protected)
            folders.clean_abandoned(save.final.parent, save.final)
        for act in save.after_commit:
            act()

    _step(save.named, what, write_it)
    _step(save.named, what, prepare)  # from here on every disk has a sealed folder
    _step(save.named, f"committing {save.named}", commit)
    _step(save.named, f"moving the files of {save.named} (which is committed) into place", move)
    _step(save.named, f"tidying up after {save.named} (which is committed)", tidy)


def _let_go(save: Save) -> None:
    if save.held is not None:
        folders.release(save.held)
        save.held = None


def _share_metadata(save: Save) -> None:
    """Puts a `.metadata` into the folders of other nodes: reading needs one, and DCP wrote rank 0's."""
    if len(set(save.leaders)) == 1:
        return
    contents = ranks.from_rank0(save.node_metadata)

    def write() -> None:
        if save.is_leader and ranks.rank() != 0:
            for folder, by_leader in contents.items():
                (save.work / folder).mkdir(exist_ok=True)
                (save.work / folder / METADATA_NAME).write_bytes(by_leader[ranks.rank()])

    _step(save.named, f"saving {save.named}", write)


def _seal(save: Save) -> Manifest:
    """Hashes and syncs what DCP did not write, and describes the whole. A collective; the manifest is the
    same everywhere."""
    entries = ranks.gather(save.entries)
    known: dict[int, dict[str, FileEntry]] = {leader: {} for leader in save.leaders}
    for r, written in enumerate(entries):
        known[save.leaders[r]] |= written

    def seal_rest() -> dict[str, FileEntry]:
        if not save.is_leader:
            return {}
        mine = known[ranks.rank()]
        return mine | _hash_rest(save.work, set(mine), save.algorithm)

    sealed = ranks.gather(_step(save.named, f"saving {save.named}", seal_rest))
    leaders = sorted(set(save.leaders))

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
            digest_algorithm=save.algorithm,
            nodes=tuple(hosts[leader] for leader in leaders),
            files=tuple(sealed[leader] for leader in leaders),
            tensors={folder: tensors_of(metadata) for folder, metadata in save.metadata.items()},
        )

    hosts = ranks.gather(ranks.host())
    return ranks.from_rank0(_step(save.named, f"saving {save.named}", describe))  # type: ignore[return-value]


def _hash_rest(root: Path, known: set[str], algorithm: str) -> dict[str, FileEntry]:
    """Checksums of the files that DCP's writer did not hash, each made durable."""
    rest = {}
    with hashing_pool() as pool:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            name = path.relative_to(root).as_posix()
            if name in known or folders.is_internal(path):
                continue
            fsync_path(path)
            rest[name] = FileEntry(path.stat().st_size, file_digest(path, algorithm, pool))
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


# --- wrapper makers
# ----------------------------------------------------------------------------------------------


def wrap_save_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """For accelerate.Accelerator.save_state: the whole save is one commit, rotation follows it.

    Hooks that the user registered with register_save_state_pre_hook are given the folder that is being filled.
    """

    @functools.wraps(original)
    @ends_before_sigterm
    def save_state(self, output_dir=None, safe_serialization=True, **save_model_func_kwargs):
        models = prepared_models(self._models)
        if not models:
            return original(self, output_dir, safe_serialization, **save_model_func_kwargs)
        meet("Accelerator.save_state")
        wait_for_background()
        project = self.project_configuration
        naming = project.automatic_checkpoint_naming
        if naming:
            final = Path(self.project_dir) / "checkpoints" / f"checkpoint_{self.save_iteration}"
            transaction.recover_everywhere(None, transaction.resolved(final.parent))
            _refuse_a_number_in_use(final, self.save_iteration)
        else:
            final = Path(output_dir)
        iteration = project.iteration
        save = begin(final, models)
        save.step = _optimizer_step(self._optimizers)
        if naming:
            save.prefix, save.keep = "checkpoint_", project.total_limit
        project.automatic_checkpoint_naming = False  # the original must write where it is told
        try:
            fill(save, lambda: original(self, str(save.work), safe_serialization, **save_model_func_kwargs))
        except Exception:
            project.iteration = iteration  # the original counts on the ranks where it did not fail
            raise
        finally:
            project.automatic_checkpoint_naming = naming
        complete(save)
        return final

    return save_state


def _refuse_a_number_in_use(final: Path, number: int) -> None:
    """Raises ValueError, as accelerate does, on every rank. A collective."""
    if not any(ranks.gather(final.exists())):
        return
    there = [int(path.name.rpartition("_")[2]) for path in folders.numbered(final.parent, "checkpoint_")]
    highest = max(there, default=number)
    free = max(ranks.gather(highest)) + 1
    raise ValueError(
        f"{final} exists, expected a checkpoint that is not there yet: accelerate counts from {number} in this "
        f"process, and an earlier run wrote that number. Set accelerator.project_configuration.iteration = {free} "
        f"(after load_state, or before the first save_state), or use another project_dir."
    )


def fill(save: Save, original: Callable[[], Any]) -> None:
    """Runs the original save with `save` in force. What a rank raises there is raised on all."""
    global _active
    assert _active is None, "a save inside a save"
    _active = save
    try:
        _step(save.named, f"saving {save.named}", original)
    except Exception:
        _discard(save)
        raise
    finally:
        _active = None


def _discard(save: Save) -> None:
    """Removes what a failed save wrote, so that it does not fill the disk. Best effort; never hides the failure.

    What was sealed stays when another node may have committed its part.
    """
    if save.is_leader and not save.must_stay:
        transaction.discard(save.work, save.staging)
    _let_go(save)


def _optimizer_step(optimizers: Iterable[Any]) -> int | None:
    """How many steps the optimizer has made, by its own count; None when it keeps none."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            if isinstance(state, dict) and "step" in state:
                return int(state["step"])
    return None


def wrap_save_fsdp_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """For save_fsdp_model, where accelerate and Trainer call it: DCP with checksums, staged when async."""

    @functools.wraps(original)
    def save_fsdp_model(fsdp_plugin, accelerator, model, output_dir, model_index=0, adapter_only=False, use_dcp=True):
        save = _active
        if save is None or state_of(model) is None:
            return original(fsdp_plugin, accelerator, model, output_dir, model_index, adapter_only, use_dcp)
        if not (use_dcp and takes_dcp(fsdp_plugin, model, adapter_only)):

            def plain() -> Any:
                return original(fsdp_plugin, accelerator, model, output_dir, model_index, adapter_only, use_dcp)

            return _step(save.named, f"saving {save.named}", plain)
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        state_dict = get_model_state_dict(model, options=sharded_options())
        write_dcp(save, f"{MODEL_FOLDER}_{model_index}", {"model": state_dict})

    return save_fsdp_model


def wrap_save_fsdp_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """For save_fsdp_optimizer, where accelerate and Trainer call it."""

    @functools.wraps(original)
    def save_fsdp_optimizer(fsdp_plugin, accelerator, optimizer, model, output_dir, optimizer_index=0, use_dcp=True):
        save = _active
        if save is None or state_of(model) is None:
            return original(fsdp_plugin, accelerator, optimizer, model, output_dir, optimizer_index, use_dcp)
        if not (use_dcp and takes_dcp(fsdp_plugin, model, False)):

            def plain() -> Any:
                return original(fsdp_plugin, accelerator, optimizer, model, output_dir, optimizer_index, use_dcp)

            return _step(save.named, f"saving {save.named}", plain)
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        state_dict = get_optimizer_state_dict(model, optimizer, options=sharded_options())
        write_dcp(save, f"{OPTIMIZER_FOLDER}_{optimizer_index}", {"optimizer": state_dict})

    return save_fsdp_optimizer


def takes_dcp(fsdp_plugin: Any, model: Any, adapter_only: bool) -> bool:
    """Whether accelerate would save this with DCP from FSDP2, adapters aside: the road that is ours."""
    from accelerate.utils.modeling import is_peft_model

    sharded = "SHARDED_STATE_DICT" in str(fsdp_plugin.state_dict_type)
    return fsdp_plugin.fsdp_version == 2 and sharded and not (adapter_only and is_peft_model(model))


def sharded_options() -> Any:
    """State dicts of the shards where they are.

    accelerate asks for copies in host memory; DCP copies one tensor at a time without that, an asynchronous save
    copies to pinned memory that it reuses, and a load writes in place.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=False, cpu_offload=False)


# --- Trainer
# -----------------------------------------------------------------------------------------------------


def wrap_save_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """For transformers.Trainer._save_checkpoint: one commit, and rotation after it."""

    @functools.wraps(original)
    @ends_before_sigterm
    def _save_checkpoint(self, model, trial):
        models = prepared_models([self.model])
        if not models:
            return original(self, model, trial)
        meet("a checkpoint of Trainer")
        wait_for_background()
        run_dir = Path(self._get_output_dir(trial=trial))
        save = begin(run_dir / f"checkpoint-{self.state.global_step}", models)
        save.step, save.prefix, save.keep = self.state.global_step, "checkpoint-", self.args.save_total_limit

        def write() -> None:
            original(self, model, trial)
            _rename_best(self, save)

        fill(save, write)
        if self.state.best_model_checkpoint is not None:
            save.protected.append(Path(self.state.best_model_checkpoint))
        complete(save)

    return _save_checkpoint


def _rename_best(trainer: Any, save: Save) -> None:
    """The best checkpoint is known by its final name, in memory and in trainer_state.json.

    Trainer looks for the folder of the best step where it saves, which is our temporary folder: this one's it finds
    there, and those of earlier steps are looked for beside the final name. So a run that was moved to another folder
    finds its best again, as without us.
    """
    best = save.named.parent / f"checkpoint-{trainer.state.best_global_step}"
    found = best == save.named or best.is_dir()
    looks = trainer.args.save_strategy in ("steps", "epoch", "best") and trainer.state.best_global_step
    if looks and found and trainer.state.best_model_checkpoint != str(best):
        trainer.state.best_model_checkpoint = str(best)
        if trainer.args.should_save:
            trainer.state.save_to_json(str(save.work / "trainer_state.json"))


def wrap_get_output_dir(original: Callable[..., Any]) -> Callable[..., Any]:
    """For transformers.Trainer._get_output_dir: while a save is under way, its temporary folder."""

    @functools.wraps(original)
    def _get_output_dir(self, trial):
        return original(self, trial) if _active is None else str(_active.staging)

    return _get_output_dir


def wrap_push_from_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """For transformers.Trainer._push_from_checkpoint: after the commit, from the committed folder."""

    @functools.wraps(original)
    def _push_from_checkpoint(self, checkpoint_folder):
        save = _active
        if save is None:
            return original(self, checkpoint_folder)
        save.after_commit.append(lambda: original(self, str(save.named)))

    return _push_from_checkpoint


def wrap_save_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """For transformers.Trainer.save_model.

    With SHARDED_STATE_DICT the original writes no weights and says nothing. A user who calls it wants them:
    they are gathered to rank 0's host memory and saved whole. Inside a checkpoint nothing changes. A
    collective.
    """

    @functools.wraps(original)
    def save_model(self, output_dir=None, _internal_call=False):
        save = _active
        if save is not None:
            return _step(save.named, f"saving {save.named}", lambda: original(self, output_dir, _internal_call))
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        gathers = not _internal_call and prepared_models([self.model]) and self.is_fsdp_enabled and plugin is not None
        if gathers:
            meet(
                "Trainer.save_model",
                "It gathers the shards of all: call it outside of `if trainer.is_world_process_zero()`; the main rank "
                "alone writes.",
            )
        if gathers and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            folder = output_dir if output_dir is not None else self.args.output_dir
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))
        return original(self, output_dir, _internal_call)

    return save_model
