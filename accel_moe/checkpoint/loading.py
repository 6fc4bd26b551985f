"""Loading: verify before the model is touched, resume from committed folders only, on any number of ranks.

A folder with a manifest is checked first: every file's size, every checksum (unless `moe_verify: sizes`),
that DCP's metadata is the one that was saved and its chunks tile every tensor, and that the tensors are this
model's. The work is shared out between the ranks that see the same folder; what one finds is raised on all.
Then accelerate's own load runs, with DCP reading into the shards: another ep degree, efsdp, HSDP or world
size needs nothing special.

A folder without a manifest (stock accelerate wrote it) is loaded with a warning that nothing vouches for it.

With another world size, what belonged to one rank cannot be restored for all of them (RNG, the position of a
dataloader without state): that is said in one warning. The learning-rate schedule keeps its position:
accelerate steps it once per process, so it counts batches of data, and resumes at the same amount of data
seen.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dist_cp

from accel_moe.checkpoint import folders, ranks, transaction
from accel_moe.checkpoint.dcp import (
    MODEL_FOLDER,
    MODEL_PREFIX,
    OPTIMIZER_FOLDER,
    FolderReader,
    check_metadata,
    same_layout,
    tensors_of,
    was_written_with_manifest,
)
from accel_moe.checkpoint.manifest import CheckpointError, Manifest, check_files, known_paths, read_manifest
from accel_moe.checkpoint.saving import (
    option,
    prepared_models,
    sharded_options,
    state_of,
    takes_dcp,
    wait_for_background,
)
from accel_moe.experts import plain_name

_verified: dict[str, Manifest | None] = {}  # folders whose load is under way, and what vouches for them


# --- verifying
# ---------------------------------------------------------------------------------------------------


def verify(folder: Path, models: list[Any]) -> Manifest | None:
    """Checks a checkpoint folder against its manifest and the models. A collective of all ranks.

    Returns the manifest, or None (with a warning) for a stock checkpoint. Raises CheckpointError on every
    rank: missing, never committed, damaged, or of another model.
    """
    checksums = option(models, "moe_verify") != "sizes"
    manifest = ranks.together(f"reading {folder}", lambda: _read(folder))
    shared = _shares_of(folder, manifest)
    if manifest is None:
        if ranks.rank() == 0:
            warnings.warn(
                f"{folder} has no manifest (stock accelerate wrote it): nothing vouches for its bytes. It "
                f"is loaded as it is.",
                stacklevel=2,
            )
    else:
        problems: list[str] = []

        def check() -> None:
            mine = [path for i, path in enumerate(_by_size(manifest)) if i % shared[1] == shared[0]]
            problems.extend(check_files(folder, manifest, paths=mine, checksums=checksums))

        ranks.together(f"verifying {folder}", check)
        found = list(dict.fromkeys(line for lines in ranks.gather(problems) for line in lines))
        if found:
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            raise CheckpointError(
                f"{folder} is damaged: {'; '.join(found[:3])}{more}. Nothing was loaded. Use another "
                f"checkpoint, or restore "
                "the files."
            )
    ranks.together(f"checking {folder}", lambda: _check_dcp(folder, manifest, models))
    return manifest


def _read(folder: Path) -> Manifest | None:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder. Give the folder that save_state or Trainer wrote.{_near(folder)}"
        )
    folders.refuse_unfinished(folder)
    return read_manifest(folder)


def _near(folder: Path) -> str:
    names = sorted(p.name for p in folder.parent.iterdir() if p.is_dir())[:5] if folder.parent.is_dir() else []
    return f" Beside it there are {', '.join(names)}." if names else ""


def _by_size(manifest: Manifest) -> list[str]:
    """Files largest first, so that dealing them out in turn gives each rank about the same number of bytes."""
    sizes = {path: entry.size_bytes for files in manifest.files for path, entry in files.items()}
    return sorted(known_paths(manifest), key=lambda path: (-sizes[path], path))


def _shares_of(folder: Path, manifest: Manifest | None) -> tuple[int, int]:
    """(this rank's share, number of shares) among the ranks that see the same folder. A collective."""
    stat = folder.stat()
    identity = (ranks.host(), stat.st_dev, stat.st_ino)
    if len({node for node in ranks.gather(None if manifest is None else manifest.node)}) == 1:
        identity = (str(folder), 0, 0)  # one folder on a shared disk, whose device number may differ between hosts
    everyone = ranks.gather(identity)
    sharing = [r for r, other in enumerate(everyone) if other == everyone[ranks.rank()]]
    return sharing.index(ranks.rank()), len(sharing)


def _check_dcp(folder: Path, manifest: Manifest | None, models: list[Any]) -> None:
    from accelerate.utils.modeling import is_peft_model

    for index, model in enumerate(models):
        dcp_folder = folder / f"{MODEL_FOLDER}_{index}"
        if not dcp_folder.is_dir():
            _explain_missing(folder, dcp_folder, manifest)
            continue
        metadata = FolderReader([dcp_folder], manifest).read_metadata()
        if manifest is None and was_written_with_manifest(metadata):
            raise CheckpointError(
                f"{folder} was written with a manifest, and it is gone: the copy is incomplete. Copy the "
                f"folder again, all "
                "of its files."
            )
        if problems := check_metadata(metadata):
            raise CheckpointError(f"{dcp_folder} is incomplete: {problems[0]}. Use another checkpoint.")
        stored = tensors_of(metadata)
        if manifest is not None and not same_layout(stored, manifest.tensors.get(dcp_folder.name, {})):
            raise CheckpointError(
                f"{dcp_folder}/.metadata is not the one that the manifest describes: files of two saves are "
                f"mixed. Use "
                "another checkpoint, or restore the folder."
            )
        if not is_peft_model(model):  # whose checkpoint may hold the adapters alone
            _check_model(folder, stored, model, manifest)


def _explain_missing(folder: Path, dcp_folder: Path, manifest: Manifest | None) -> None:
    """A folder with no DCP model is fine when it was saved whole; else raises CheckpointError."""
    whole = ("pytorch_model_fsdp", "model.safetensors", "pytorch_model")
    found = sorted(path.name for path in folder.iterdir())
    if any(name.startswith(whole) for name in found):
        return
    raise CheckpointError(
        f"{folder} holds no model: expected {dcp_folder.name}/, found {', '.join(found[:6]) or 'nothing'}. "
        f"Give the folder "
        "that save_state or Trainer wrote."
    )


def _check_model(folder: Path, stored: dict[str, Any], model: Any, manifest: Manifest | None) -> None:
    """Raises CheckpointError when names or shapes are not the model's."""
    theirs = {plain_name(n.removeprefix(MODEL_PREFIX)): e.shape for n, e in stored.items()}
    ours = {plain_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    wrong = [
        f"{name} has shape {theirs[name]} there, {shape} here"
        for name, shape in ours.items()
        if name in theirs and theirs[name] != shape
    ]
    wrong += [f"{name} is not in it" for name in ours if name not in theirs and name not in tied]
    wrong += [f"{name} is only there" for name in theirs if name not in ours and name not in tied]
    if not wrong:
        return
    whose = ""
    if manifest is not None and manifest.model_type:
        whose = f" ({manifest.model_type}, base {manifest.base_model or 'unknown'})"
    more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
    raise CheckpointError(
        f"{folder} is a checkpoint of another model{whose}: {'; '.join(wrong[:3])}{more}. Build the model "
        f"that was trained "
        "there, or give another folder."
    )


# --- which checkpoint
# --------------------------------------------------------------------------------------------


def newest_on_all_ranks(parent: Path, prefix: str) -> Path:
    """The newest checkpoint that is committed on every rank's disk. A collective. Raises CheckpointError."""
    transaction.recover_everywhere(None, transaction.resolved(parent))
    here = {path.name: folders.is_committed(path) for path in folders.numbered(parent, prefix)}
    everyone = ranks.gather(here)
    passed_over = [path.name for path in folders.unfinished(parent)]
    names = sorted(here, key=lambda name: int(name.removeprefix(prefix)), reverse=True)
    vouched = [name for name in names if all(other.get(name) for other in everyone)]
    if vouched:
        newest = vouched[0]
        passed_over += names[: names.index(newest)]
    elif names and not any(committed for other in everyone for committed in other.values()):
        newest = names[0]  # all of them are stock checkpoints
    else:
        raise CheckpointError(
            f"{parent} has no finished checkpoint: expected folders {prefix}<number>, found "
            f"{', '.join(passed_over + names) or 'nothing'}. Start without resuming."
        )
    if passed_over and ranks.rank() == 0:
        warnings.warn(f"resuming from {newest}; never finished: {', '.join(passed_over)}.", stacklevel=3)
    return parent / newest


def wrap_get_last_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """For get_last_checkpoint where Trainer calls it: the newest committed folder.

    A run whose folders were all written without us is left to the original. Not a collective.
    """

    @functools.wraps(original)
    def get_last_checkpoint(folder):
        parent = Path(folder)
        transaction.recover_beside(parent)
        newest, passed_over = folders.newest_committed(parent, "checkpoint-")
        if newest is None:
            return original(folder)
        if passed_over:
            warnings.warn(f"resuming from {newest.name}; {'; '.join(passed_over)}.", stacklevel=2)
        return os.path.join(folder, newest.name)

    return get_last_checkpoint


# --- wrapper makers
# ----------------------------------------------------------------------------------------------


def wrap_load_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """For accelerate.Accelerator.load_state: verifies, picks committed folders only, says what was not
    restored."""

    @functools.wraps(original)
    def load_state(self, input_dir=None, load_kwargs=None, **load_model_func_kwargs):
        models = prepared_models(self._models)
        if not models:
            return original(self, input_dir, load_kwargs, **load_model_func_kwargs)
        wait_for_background()
        if input_dir is not None:
            folder = Path(os.path.abspath(os.path.expanduser(input_dir)))
            transaction.recover_everywhere(transaction.resolved(folder))
        elif self.project_configuration.automatic_checkpoint_naming:
            folder = newest_on_all_ranks(Path(self.project_dir) / "checkpoints", "checkpoint_")
        else:
            return original(self, input_dir, load_kwargs, **load_model_func_kwargs)  # it raises
        manifest = verify(folder, list(self._models))
        _verified[str(folder)] = manifest
        try:
            # together: a file that only one rank misses (a scheduler's, on a node of its own) must not leave it alone
            result = ranks.together(
                f"loading {folder}", lambda: original(self, str(folder), load_kwargs, **load_model_func_kwargs)
            )
        finally:
            _verified.pop(str(folder), None)
        # a rank that did not exist then has no file with its step count, and would accumulate out of turn
        self.step = ranks.from_rank0(self.step)
        _tell_what_is_lost(folder, manifest)
        return result

    return load_state


def _tell_what_is_lost(folder: Path, manifest: Manifest | None) -> None:
    """One warning when the world has another size: what belonged to a rank has nobody, or everybody, to go
    to."""
    if manifest is not None:
        before = manifest.world_size
    else:
        before = len(
            [p for p in folder.iterdir() if re.fullmatch(r"random_states_\d+\.pkl|rng_state_\d+\.pth", p.name)]
        )
    now = ranks.world_size()
    if before in (0, now) or ranks.rank() != 0:
        return
    lost = "the random state of the new ranks" if now > before else "the random state of the ranks that are gone"
    warnings.warn(
        f"{folder.name} was saved by {before} ranks and is loaded by {now}. Weights and optimizer are "
        f"restored exactly. Not "
        f"restored: {lost}, and the position of the dataloader within the epoch, unless it keeps its own "
        f"state "
        "(use_stateful_dataloader). The learning-rate schedule goes on after the same number of batches "
        "over all ranks.",
        stacklevel=3,
    )


def wrap_load_fsdp_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """For load_fsdp_model where accelerate and Trainer call it: verified first, read with errors that name
    the node."""

    @functools.wraps(original)
    def load_fsdp_model(fsdp_plugin, accelerator, model, input_dir, model_index=0, adapter_only=False, use_dcp=True):
        if state_of(model) is None:
            return original(fsdp_plugin, accelerator, model, input_dir, model_index, adapter_only, use_dcp)
        wait_for_background()
        folder = _checkpoint_of(input_dir, f"{MODEL_FOLDER}_{model_index}")
        if str(folder) in _verified:
            manifest = _verified[str(folder)]
        else:  # Trainer: verified here, once for the model and the optimizer that follows
            manifest = verify(folder, [model])
            _verified[str(folder)] = manifest
        if not (use_dcp and takes_dcp(fsdp_plugin, model, adapter_only)):

            def plain() -> Any:
                return original(fsdp_plugin, accelerator, model, input_dir, model_index, adapter_only, use_dcp)

            return ranks.together(f"loading {folder}", plain)
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

        options = sharded_options()
        state = {"model": get_model_state_dict(model, options=options)}
        _read_dcp(folder, f"{MODEL_FOLDER}_{model_index}", state, manifest)
        result = set_model_state_dict(model, state["model"], options=options)
        ranks.barrier()
        return result

    return load_fsdp_model


def wrap_load_fsdp_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """For load_fsdp_optimizer where accelerate and Trainer call it."""

    @functools.wraps(original)
    def load_fsdp_optimizer(
        fsdp_plugin, accelerator, optimizer, model, input_dir, optimizer_index=0, adapter_only=False, use_dcp=True
    ):
        if state_of(model) is None or not (use_dcp and takes_dcp(fsdp_plugin, model, False)):
            return original(
                fsdp_plugin, accelerator, optimizer, model, input_dir, optimizer_index, adapter_only, use_dcp
            )
        wait_for_background()
        folder = _checkpoint_of(input_dir, f"{OPTIMIZER_FOLDER}_{optimizer_index}")
        manifest = _verified[str(folder)] if str(folder) in _verified else verify(folder, [model])
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        options = sharded_options()
        state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        _read_dcp(folder, f"{OPTIMIZER_FOLDER}_{optimizer_index}", state, manifest)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        ranks.barrier()

    return load_fsdp_optimizer


def _checkpoint_of(input_dir: Any, dcp_folder: str) -> Path:
    """The checkpoint folder; accelerate also takes the DCP folder inside it."""
    folder = Path(os.path.abspath(os.path.expanduser(input_dir)))
    return folder.parent if folder.name == dcp_folder else folder


def _read_dcp(folder: Path, dcp_folder: str, state: dict[str, Any], manifest: Manifest | None) -> None:
    """Reads into the state's tensors, in place. A collective. Raises CheckpointError on every rank."""

    def read() -> None:
        metadata = FolderReader([folder / dcp_folder], manifest).read_metadata()
        if problems := check_metadata(metadata):
            raise CheckpointError(f"{folder / dcp_folder} is incomplete: {problems[0]}. Use another checkpoint.")

    ranks.together(f"loading {folder}", read)

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

    ranks.together(f"loading {folder}", load)


def wrap_load_optimizer_and_scheduler(original: Callable[..., Any]) -> Callable[..., Any]:
    """For transformers.Trainer._load_optimizer_and_scheduler: the last step of a resume; forgets what was
    verified."""

    @functools.wraps(original)
    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not prepared_models([self.model]):
            return original(self, checkpoint)
        result = ranks.together(f"loading {checkpoint}", lambda: original(self, checkpoint))
        folder = Path(os.path.abspath(checkpoint))
        if str(folder) in _verified:
            _tell_what_is_lost(folder, _verified.pop(str(folder)))
        return result

    return _load_optimizer_and_scheduler
