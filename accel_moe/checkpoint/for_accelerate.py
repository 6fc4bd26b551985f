"""accelerate's saves and loads of a model that accel_moe prepared.

    save_state    accelerate fills a folder as it always does; saving.py makes that folder one commit
    load_state    verify.py checks the folder before the model is touched; then accelerate loads it

Inside, the FSDP model and optimizer go through DCP with checksums: another ep degree, efsdp, HSDP or world size needs
nothing special. Trainer, which never calls save_state, imports these four functions by name: they are patched there,
too. Nothing changes for a model that accel_moe did not prepare.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accel_moe import ranks
from accel_moe.checkpoint import folders, loading, node_local, saving, transaction
from accel_moe.checkpoint.adapter_run import adapters_of, names_in, without_base
from accel_moe.checkpoint.background import ends_before_sigterm, wait_for_background
from accel_moe.checkpoint.dcp_metadata import MODEL_FOLDER, OPTIMIZER_FOLDER, tensors_of
from accel_moe.checkpoint.resume import newest_checkpoint
from accel_moe.checkpoint.saving import prepared_models, state_of
from accel_moe.checkpoint.verify import Verified, check_kind, verify
from accel_moe.errors import CheckpointError
from accel_moe.names import plain_name
from accel_moe.patching import ACCELERATE, TRAINER, patch
from accel_moe.whereabouts import meet


@patch(
    "accelerate.Accelerator.save_state",
    why="A crash while saving must leave the last checkpoint as it was: the folder appears by a rename, and rotation, "
    "which accelerate does before it writes, comes after. Its hooks run in the middle of a save.",
    tested=ACCELERATE,
)
@ends_before_sigterm
def save_state(original, self, output_dir=None, safe_serialization=True, **save_model_func_kwargs):
    """Hooks that the user registered with register_save_state_pre_hook are given the folder that is being filled."""
    models = prepared_models(self._models)
    if not models:
        return original(self, output_dir, safe_serialization, **save_model_func_kwargs)
    meet("Accelerator.save_state")
    wait_for_background()
    project = self.project_configuration
    naming = project.automatic_checkpoint_naming
    if naming:
        final = Path(self.project_dir) / "checkpoints" / f"checkpoint_{self.save_iteration}"
        node_local.recover_everywhere(None, transaction.resolved(final.parent))
        _refuse_a_number_in_use(final, self.save_iteration)
    else:
        final = Path(output_dir)
    iteration = project.iteration
    save = saving.begin(final, models)
    save.step = _optimizer_step(self._optimizers)
    if naming:
        save.prefix, save.keep = "checkpoint_", project.total_limit
    project.automatic_checkpoint_naming = False  # the original must write where it is told
    try:
        saving.fill(save, lambda: original(self, str(save.work), safe_serialization, **save_model_func_kwargs))
    except Exception:
        project.iteration = iteration  # the original counts on the ranks where it did not fail
        raise
    finally:
        project.automatic_checkpoint_naming = naming
    saving.complete(save)
    return final


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
        "(after load_state, or before the first save_state), or use another project_dir."
    )


def _optimizer_step(optimizers: Iterable[Any]) -> int | None:
    """How many steps the optimizer has made, by its own count; None when it keeps none."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            if isinstance(state, dict) and "step" in state:
                return int(state["step"])
    return None


@patch(
    "accelerate.Accelerator.load_state",
    why="The folder is verified before the model is touched, and the newest one may be unfinished.",
    tested=ACCELERATE,
)
def load_state(original, self, input_dir=None, load_kwargs=None, **load_model_func_kwargs):
    models = prepared_models(self._models)
    if not models:
        return original(self, input_dir, load_kwargs, **load_model_func_kwargs)
    meet("Accelerator.load_state")
    wait_for_background()
    if input_dir is not None:
        folder = transaction.absolute(input_dir)
        node_local.recover_everywhere(transaction.resolved(folder))
    elif self.project_configuration.automatic_checkpoint_naming:
        folder = newest_checkpoint(Path(self.project_dir) / "checkpoints", "checkpoint_")
    else:
        return original(self, input_dir, load_kwargs, **load_model_func_kwargs)  # it raises
    if self.distributed_type.value == "FSDP":
        ranks.run_or_raise_everywhere(
            f"checking {folder}", partial(_check_kinds, folder, self.state.fsdp_plugin, len(self._models))
        )
    verified = verify(folder, list(self._models))
    load = partial(original, self, str(folder), load_kwargs, **load_model_func_kwargs)
    with loading.loading_from(verified), _without(self, verified):
        # a file that only one rank misses (a scheduler's, on a node of its own) must not leave the others waiting
        result = ranks.run_or_raise_everywhere(f"loading {folder}", load)
    # a rank that did not exist then has no file with its step count, and would accumulate out of turn
    self.step = ranks.from_rank0(self.step)
    loading.tell_what_is_lost(folder, verified.manifest)
    return result


def _check_kinds(folder: Path, plugin: Any, models: int) -> None:
    for index in range(models):
        check_kind(folder, plugin, index)


@contextmanager
def _without(accelerator: Any, verified: Verified) -> Iterator[None]:
    """Within it, load_state leaves out the objects whose files were thinned away; they keep the values they have."""
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


@patch(
    "accelerate.accelerator.save_fsdp_model",
    "transformers.trainer.save_fsdp_model",
    why="DCP with checksums, and in the background; accelerate builds DCP's writer itself.",
    tested=TRAINER,
)
def save_fsdp_model(
    original, fsdp_plugin, accelerator, model, output_dir, model_index=0, adapter_only=False, use_dcp=True
):
    save = saving.under_way()
    adapter_only = adapter_only or _whole_adapter(fsdp_plugin, model)
    plain = partial(original, fsdp_plugin, accelerator, model, output_dir, model_index, adapter_only, use_dcp)
    if save is None or state_of(model) is None:
        return plain()
    if not (use_dcp and _takes_dcp(fsdp_plugin)):
        return save.run(f"saving {save.named}", plain)
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state_dict = without_base(model, get_model_state_dict(model, options=_sharded_options()))
    saving.write_dcp(save, f"{MODEL_FOLDER}_{model_index}", {"model": state_dict})


@patch(
    "accelerate.accelerator.save_fsdp_optimizer",
    "transformers.trainer.save_fsdp_optimizer",
    why="DCP with checksums, and in the background, as for the model.",
    tested=TRAINER,
)
def save_fsdp_optimizer(
    original, fsdp_plugin, accelerator, optimizer, model, output_dir, optimizer_index=0, use_dcp=True
):
    save = saving.under_way()
    plain = partial(original, fsdp_plugin, accelerator, optimizer, model, output_dir, optimizer_index, use_dcp)
    if save is None or state_of(model) is None:
        return plain()
    if not (use_dcp and _takes_dcp(fsdp_plugin)):
        return save.run(f"saving {save.named}", plain)
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state_dict = get_optimizer_state_dict(model, optimizer, options=_sharded_options())
    saving.write_dcp(save, f"{OPTIMIZER_FOLDER}_{optimizer_index}", {"optimizer": state_dict})


def _whole_adapter(fsdp_plugin: Any, model: Any) -> bool:
    """Whether accelerate is to gather the trained parameters alone, of a PEFT model that accel_moe prepared."""
    full = "FULL_STATE_DICT" in str(fsdp_plugin.state_dict_type)
    return fsdp_plugin.fsdp_version == 2 and full and state_of(model) is not None and bool(adapters_of(model))


def _takes_dcp(fsdp_plugin: Any) -> bool:
    """Whether accelerate would save this with DCP from FSDP2."""
    return fsdp_plugin.fsdp_version == 2 and "SHARDED_STATE_DICT" in str(fsdp_plugin.state_dict_type)


def _sharded_options() -> Any:
    """State dicts of the shards where they are.

    accelerate asks for copies in host memory; DCP copies one tensor at a time without that, an asynchronous save
    copies to pinned memory that it reuses, and a load writes in place.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=False, cpu_offload=False)


@patch(
    "accelerate.accelerator.load_fsdp_model",
    "transformers.trainer.load_fsdp_model",
    why="DCP leaves missing chunks uninitialised, and a missing file on one rank hangs the others.",
    tested=TRAINER,
)
def load_fsdp_model(
    original, fsdp_plugin, accelerator, model, input_dir, model_index=0, adapter_only=False, use_dcp=True
):
    adapter_only = adapter_only or _whole_adapter(fsdp_plugin, model)
    plain = partial(original, fsdp_plugin, accelerator, model, input_dir, model_index, adapter_only, use_dcp)
    if state_of(model) is None:
        return plain()
    wait_for_background()
    name = f"{MODEL_FOLDER}_{model_index}"
    folder = _checkpoint_of(input_dir, name)
    verified = loading.under_way()
    from_trainer = verified is None
    if verified is None:
        loading.remember(None)
        if accelerator.distributed_type.value == "FSDP":
            check = partial(check_kind, folder, fsdp_plugin, model_index, use_dcp=use_dcp)
            ranks.run_or_raise_everywhere(f"checking {folder}", check)
        verified = verify(folder, [model])
    if use_dcp and _takes_dcp(fsdp_plugin):
        result = _load_sharded(folder, name, model, verified)
    else:
        result = ranks.run_or_raise_everywhere(f"loading {folder}", plain)
    if from_trainer:
        loading.remember(verified)
    return result


def _load_sharded(folder: Path, name: str, model: Any, verified: Verified) -> Any:
    """DCP's values into the model's shards; of a PEFT model, the values that the checkpoint has. A collective."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    options = _sharded_options()
    state = get_model_state_dict(model, options=options)
    stored = tensors_of(loading.checked_metadata(folder, name, verified.manifest))
    if adapters_of(model):
        options.strict = False  # the base is not in it
        names = names_in(model, state, stored)
        loading.read_dcp(folder, name, {"model": {n: state[live] for n, live in names.items()}}, verified.manifest)
        state = {live: state[live] for live in names.values()}
    else:
        loading.read_dcp(folder, name, {"model": state}, verified.manifest)
    result = set_model_state_dict(model, state, options=options)
    ranks.barrier()
    return result._replace(missing_keys=list(without_base(model, dict.fromkeys(result.missing_keys))))


@patch(
    "accelerate.accelerator.load_fsdp_optimizer",
    "transformers.trainer.load_fsdp_optimizer",
    why="DCP leaves missing chunks uninitialised, and a missing file on one rank hangs the others, as for the model.",
    tested=TRAINER,
)
def load_fsdp_optimizer(
    original, fsdp_plugin, accelerator, optimizer, model, input_dir, optimizer_index=0, adapter_only=False, use_dcp=True
):
    ours = state_of(model) is not None
    name = f"{OPTIMIZER_FOLDER}_{optimizer_index}"
    folder = _checkpoint_of(input_dir, name)
    if ours:
        wait_for_background()
        if (whole := loading.under_way()) is not None and name in whole.gone:
            return
        check = partial(check_kind, folder, fsdp_plugin, optimizer_index, optimizer=True, use_dcp=use_dcp)
        ranks.run_or_raise_everywhere(f"checking {folder}", check)
    if not (ours and use_dcp and _takes_dcp(fsdp_plugin)):
        return original(fsdp_plugin, accelerator, optimizer, model, input_dir, optimizer_index, adapter_only, use_dcp)
    verified = loading.under_way() or loading.still_verified(folder) or verify(folder, [model])
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    options = _sharded_options()
    state: Any = get_optimizer_state_dict(model, optimizer, options=options)
    stored = _with_state(loading.checked_metadata(folder, name, verified.manifest))
    state["state"] = {parameter: values for parameter, values in state["state"].items() if parameter in stored}
    trained = {plain_name(parameter) for parameter, p in model.named_parameters() if p.requires_grad}
    without = [p for group in state["param_groups"] for p in group["params"] if p in trained - stored]
    loading.read_dcp(folder, name, {"optimizer": state}, verified.manifest)
    saved = {parameter for group in state["param_groups"] for parameter in group["params"]}
    if unknown := [parameter for parameter in without if parameter not in saved]:
        raise CheckpointError(
            f"{folder} has no optimizer state of {unknown[0]} ({len(unknown)} parameters in all), which its optimizer "
            "did not have. Expected the parameters that were trained. Resume with the same optimizer, or load the "
            "model alone."
        )
    options.strict = not without  # a parameter that no forward uses has no state, in the checkpoint as in the run
    set_optimizer_state_dict(model, optimizer, state, options=options)
    ranks.barrier()


def _with_state(metadata: Any) -> set[str]:
    """The parameters of which a checkpoint's optimizer has state."""
    prefix = "optimizer.state."
    names = (name[len(prefix) :] for name in metadata.state_dict_metadata if name.startswith(prefix))
    return {name.rpartition(".")[0] for name in names}


def _checkpoint_of(input_dir: Any, dcp_folder: str) -> Path:
    """The checkpoint folder; accelerate also takes the DCP folder inside it."""
    folder = transaction.absolute(input_dir)
    return folder.parent if folder.name == dcp_folder else folder


@patch(
    "accelerate.Accelerator.end_training",
    why="It destroys the process group that a save in the background still uses.",
    tested=ACCELERATE,
)
def end_training(original, self):
    wait_for_background()
    return original(self)
