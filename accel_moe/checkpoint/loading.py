"""Loading: accelerate's and Trainer's own loads, with the folder verified before the model is touched.

verify.py checks the folder; then accelerate's own load runs, with DCP reading into the shards: another ep degree,
efsdp, HSDP or world size needs nothing special. resume.py says which folder is the newest.

With another world size, what belonged to one rank cannot be restored for all of them (RNG, the position of a
dataloader without state): that is said in one warning. The learning-rate schedule keeps its position: accelerate
steps it once per process, so it counts batches of data, and resumes at the same amount of data seen.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dist_cp

from accel_moe import ranks
from accel_moe.checkpoint import transaction
from accel_moe.checkpoint.background import wait_for_background
from accel_moe.checkpoint.dcp_metadata import MODEL_FOLDER, OPTIMIZER_FOLDER
from accel_moe.checkpoint.dcp_read import FolderReader
from accel_moe.checkpoint.manifest import Manifest
from accel_moe.checkpoint.resume import newest_on_all_ranks
from accel_moe.checkpoint.saving import prepared_models, sharded_options, state_of, takes_dcp
from accel_moe.checkpoint.verify import Verified, check_kind, read_checked, verify
from accel_moe.whereabouts import meet

_loading: Verified | None = None  # load_state's, while it runs
_model_loaded: Verified | None = None  # Trainer's: the model was loaded from it, and the optimizer may follow


def wrap_load_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """For accelerate.Accelerator.load_state: verifies, picks committed folders only, says what was not
    restored."""

    @functools.wraps(original)
    def load_state(self, input_dir=None, load_kwargs=None, **load_model_func_kwargs):
        models = prepared_models(self._models)
        if not models:
            return original(self, input_dir, load_kwargs, **load_model_func_kwargs)
        meet("Accelerator.load_state")
        wait_for_background()
        if input_dir is not None:
            folder = Path(os.path.abspath(os.path.expanduser(input_dir)))
            transaction.recover_everywhere(transaction.resolved(folder))
        elif self.project_configuration.automatic_checkpoint_naming:
            folder = newest_on_all_ranks(Path(self.project_dir) / "checkpoints", "checkpoint_")
        else:
            return original(self, input_dir, load_kwargs, **load_model_func_kwargs)  # it raises
        if self.distributed_type.value == "FSDP":
            kinds = functools.partial(_check_kinds, folder, self.state.fsdp_plugin, len(self._models))
            ranks.together(f"checking {folder}", kinds)
        verified = verify(folder, list(self._models))
        with _in_force(verified), _without(self, verified):
            # together: a file that only one rank misses (a scheduler's, on a node of its own) must not leave it alone
            result = ranks.together(
                f"loading {folder}", lambda: original(self, str(folder), load_kwargs, **load_model_func_kwargs)
            )
        # a rank that did not exist then has no file with its step count, and would accumulate out of turn
        self.step = ranks.from_rank0(self.step)
        _tell_what_is_lost(folder, verified.manifest)
        return result

    return load_state


@contextmanager
def _in_force(verified: Verified) -> Iterator[None]:
    global _loading
    _loading = verified
    try:
        yield
    finally:
        _loading = None


def _check_kinds(folder: Path, plugin: Any, models: int) -> None:
    for index in range(models):
        check_kind(folder, plugin, index)


@contextmanager
def _without(accelerator: Any, verified: Verified) -> Iterator[None]:
    """Within it, load_state asks for nothing that was thinned away: what is gone keeps the value it has."""
    gone = verified.gone
    absent = {
        "_optimizers": any(re.fullmatch(r"optimizer(_\d+)?\.bin", name) for name in gone),
        "_schedulers": any(re.fullmatch(r"scheduler(_\d+)?\.bin", name) for name in gone),
        "_dataloaders": any(re.fullmatch(r"(sampler|dl_state_dict)(_\d+)?\.bin", name) for name in gone),
        "_custom_objects": any(name.startswith("custom_checkpoint_") for name in gone),
    }
    before = {name: getattr(accelerator, name) for name, is_gone in absent.items() if is_gone}
    for name in before:
        setattr(accelerator, name, [])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(accelerator, name, value)


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
        global _model_loaded
        if state_of(model) is None:
            return original(fsdp_plugin, accelerator, model, input_dir, model_index, adapter_only, use_dcp)
        wait_for_background()
        name = f"{MODEL_FOLDER}_{model_index}"
        folder = _checkpoint_of(input_dir, name)
        verified = _loading
        if verified is None:  # Trainer
            _model_loaded = None
            if accelerator.distributed_type.value == "FSDP":
                check = functools.partial(check_kind, folder, fsdp_plugin, model_index, use_dcp=use_dcp)
                ranks.together(f"checking {folder}", check)
            verified = verify(folder, [model])
        if not (use_dcp and takes_dcp(fsdp_plugin, model, adapter_only)):

            def plain() -> Any:
                return original(fsdp_plugin, accelerator, model, input_dir, model_index, adapter_only, use_dcp)

            result = ranks.together(f"loading {folder}", plain)
        else:
            from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

            options = sharded_options()
            state = {"model": get_model_state_dict(model, options=options)}
            _read_dcp(folder, name, state, verified.manifest)
            result = set_model_state_dict(model, state["model"], options=options)
            ranks.barrier()
        if _loading is None:
            _model_loaded = verified
        return result

    return load_fsdp_model


def wrap_load_fsdp_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """For load_fsdp_optimizer where accelerate and Trainer call it."""

    @functools.wraps(original)
    def load_fsdp_optimizer(
        fsdp_plugin, accelerator, optimizer, model, input_dir, optimizer_index=0, adapter_only=False, use_dcp=True
    ):
        ours = state_of(model) is not None
        name = f"{OPTIMIZER_FOLDER}_{optimizer_index}"
        folder = _checkpoint_of(input_dir, name)
        if ours:
            wait_for_background()
            if _loading is not None and name in _loading.gone:
                return
            check = functools.partial(check_kind, folder, fsdp_plugin, optimizer_index, optimizer=True, use_dcp=use_dcp)
            ranks.together(f"checking {folder}", check)
        if not (ours and use_dcp and takes_dcp(fsdp_plugin, model, False)):
            return original(
                fsdp_plugin, accelerator, optimizer, model, input_dir, optimizer_index, adapter_only, use_dcp
            )
        verified = _loading or _still_verified(folder) or verify(folder, [model])
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        options = sharded_options()
        state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        _read_dcp(folder, name, state, verified.manifest)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        ranks.barrier()

    return load_fsdp_optimizer


def _still_verified(folder: Path) -> Verified | None:
    """What the model was loaded from just now, if it is this folder and no file of it changed since. A collective."""
    found = _model_loaded
    same = found is not None and found.folder == folder
    if not all(ranks.gather(same)):
        return None
    assert found is not None
    return found if found.still_holds() else None


def _checkpoint_of(input_dir: Any, dcp_folder: str) -> Path:
    """The checkpoint folder; accelerate also takes the DCP folder inside it."""
    folder = Path(os.path.abspath(os.path.expanduser(input_dir)))
    return folder.parent if folder.name == dcp_folder else folder


def _read_dcp(folder: Path, dcp_folder: str, state: dict[str, Any], manifest: Manifest | None) -> None:
    """Reads into the state's tensors, in place. A collective. Raises CheckpointError on every rank."""

    ranks.together(f"loading {folder}", lambda: read_checked(folder, dcp_folder, manifest))

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
        global _model_loaded
        try:
            result = ranks.together(f"loading {checkpoint}", lambda: original(self, checkpoint))
            if _model_loaded is not None and _model_loaded.folder == Path(os.path.abspath(checkpoint)):
                _tell_what_is_lost(_model_loaded.folder, _model_loaded.manifest)
        finally:
            _model_loaded = None
        return result

    return _load_optimizer_and_scheduler
