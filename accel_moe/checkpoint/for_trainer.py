"""Trainer's checkpoints of a model that accel_moe prepared.

Trainer never calls save_state: it fills a folder itself, in `_save_checkpoint`. The whole folder is one commit here,
too, and a resume takes the newest checkpoint that is whole on every rank. for_accelerate.py saves and loads the FSDP
model and optimizer inside.

Nothing changes for a model that accel_moe did not prepare.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from accel_moe import ranks
from accel_moe.checkpoint import background, loading, resume, saving, transaction
from accel_moe.checkpoint.adapter_run import adapters_of, without_base
from accel_moe.checkpoint.background import ends_before_sigterm, wait_for_background
from accel_moe.checkpoint.saving import Save, prepared_models
from accel_moe.experts.state import prepared_state
from accel_moe.patching import TRAINER, patch
from accel_moe.weights.plan import pending
from accel_moe.whereabouts import meet

logger = logging.getLogger("accel_moe")

_agreeing = False  # inside a train(resume_from_checkpoint=True) that all ranks called


@patch(
    "transformers.Trainer._save_checkpoint",
    why="Model, optimizer, RNG and trainer state are one commit, and rotation follows it; on_save fires too late.",
    tested=TRAINER,
)
@ends_before_sigterm
def _save_checkpoint(original, self, model, trial):
    models = prepared_models([self.model])
    if not models:
        return original(self, model, trial)
    meet("a checkpoint of Trainer")
    wait_for_background()
    run_dir = Path(self._get_output_dir(trial=trial))
    save = saving.begin(run_dir / f"checkpoint-{self.state.global_step}", models)
    save.step, save.prefix, save.keep = self.state.global_step, "checkpoint-", self.args.save_total_limit

    def write() -> None:
        original(self, model, trial)
        _rename_best(self, save)

    saving.fill(save, write)
    if self.state.best_model_checkpoint is not None:
        save.protected.append(Path(self.state.best_model_checkpoint))
    saving.complete(save)


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


@patch(
    "transformers.Trainer._get_output_dir",
    why="_save_checkpoint asks it where to write: into the temporary folder.",
    tested=TRAINER,
)
def _get_output_dir(original, self, trial):
    return original(self, trial) if (save := saving.under_way()) is None else str(save.staging)


@patch(
    "transformers.Trainer._push_from_checkpoint",
    why="It uploads the folder that _save_checkpoint filled, which is renamed afterwards.",
    tested=TRAINER,
)
def _push_from_checkpoint(original, self, checkpoint_folder):
    save = saving.under_way()
    if save is None:
        return original(self, checkpoint_folder)
    save.after_commit.append(lambda: original(self, str(save.named)))


@patch(
    "transformers.Trainer.save_model",
    why="With SHARDED_STATE_DICT it writes no weights and says nothing.",
    tested=TRAINER,
)
def save_model(original, self, output_dir=None, _internal_call=False):
    """A user who calls it wants the weights: they are gathered to rank 0's host memory and saved whole. A collective.

    Inside a checkpoint nothing changes.
    """
    save = saving.under_way()
    if save is not None:
        return save.run(f"saving {save.named}", lambda: original(self, output_dir, _internal_call))
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
        self._save(folder, state_dict=_whole_state(self.accelerator, self.model))
    return original(self, output_dir, _internal_call)


def _whole_state(accelerator: Any, model: Any) -> dict[str, Any]:
    """The whole tensors of a model, of a PEFT model those that its base does not have. A collective."""
    if not adapters_of(model):
        return accelerator.get_state_dict(model)
    sharded = without_base(model, model.state_dict())
    whole = ((name, t.full_tensor() if isinstance(t, DTensor) else t) for name, t in sharded.items())
    return {name: tensor.cpu() for name, tensor in whole}


@patch(
    "transformers.trainer.get_last_checkpoint",
    why="resume_from_checkpoint=True takes the highest number, committed or not, and each rank its own.",
    tested=TRAINER,
)
def get_last_checkpoint(original, folder):
    """The newest whole folder; inside train(), which is a collective, the newest that all ranks have.

    Where no folder is whole the original answers.
    """
    parent = Path(folder)
    transaction.recover_beside(parent)
    newest = resume.newest_whole(parent, "checkpoint-", ranks.gather if _agreeing else lambda value: [value])
    return original(folder) if newest is None else os.path.join(folder, newest.name)


@patch(
    "transformers.Trainer.train",
    why="A second model that was not sharded (DPO's reference) is refused before the first step; all ranks resume from "
    "one checkpoint; and a save in the background ends, and its failure is raised, before train returns.",
    tested=TRAINER,
)
def train(original, self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
    global _agreeing
    _refuse_other_models_unsharded(self)
    if prepared_models([self.model]):
        _agreeing = resume.all_resume_newest(resume_from_checkpoint, Path(self.args.output_dir))
    try:
        result = original(self, resume_from_checkpoint, trial, ignore_keys_for_eval)
    finally:
        _agreeing = False
    wait_for_background()
    return result


def _refuse_other_models_unsharded(trainer: Any) -> None:
    """Trainer prepares its own model; a second one, such as a reference, comes sharded.

    Raises:
        ValueError: a model of ours that is not: it would fail at its first forward.
    """
    own = None if trainer.model is None else prepared_state(trainer.model)
    for name, model in vars(trainer).items():
        if not isinstance(model, nn.Module) or model is trainer.model:
            continue
        state = prepared_state(model)
        whole = state is not None and state is not own and state.config.moe_ep_degree > 1 and state.mesh_plan is None
        if whole or (
            pending(model) is not None and (trainer.model is None or pending(model) is not pending(trainer.model))
        ):
            raise ValueError(
                f"{type(trainer).__name__}.{name} is a model of accel_moe that did not go through accelerator.prepare: "
                "its experts are not sharded, or its weights are not read. Shard it before the trainer is made: "
                f"`{name}, _ = Accelerator().prepare({name}, torch.optim.SGD({name}.parameters()))`."
            )


@patch(
    "transformers.Trainer._load_optimizer_and_scheduler",
    why="The last step of a resume: what another world size could not restore is said there.",
    tested=TRAINER,
)
def _load_optimizer_and_scheduler(original, self, checkpoint):
    if checkpoint is None or not prepared_models([self.model]):
        return original(self, checkpoint)
    try:
        result = ranks.run_or_raise_everywhere(f"loading {checkpoint}", lambda: original(self, checkpoint))
        if (verified := loading.remembered(transaction.absolute(checkpoint))) is not None:
            loading.tell_what_is_lost(verified.folder, verified.manifest)
    finally:
        loading.remember(None)
    return result


@patch(
    "transformers.Trainer._finalize_training",
    why="It compares and deletes checkpoint folders, the last of which a save in the background may not have "
    "committed yet.",
    tested=TRAINER,
)
def _finalize_training(original, self, trial, num_train_samples, start_time):
    wait_for_background()
    return original(self, trial, num_train_samples, start_time)


@patch(
    "transformers.trainer_callback.CallbackHandler.on_save",
    why="Callbacks upload and add to the folder in on_save: it must be committed by then, in the background, too.",
    tested=TRAINER,
)
def on_save(original, self, args, state, control, **kwargs):
    """Not a collective: every rank waits for its own thread, and only where it has a callback that uses the folder."""
    if background.exists() and (who := [type(c).__name__ for c in self.callbacks if uses_the_folder(c)]):
        if background.under_way():
            logger.info("on_save of %s is given the checkpoint: the save in the background ends first.", who[0])
        wait_for_background()
    return original(self, args, state, control, **kwargs)


_IDLE: dict[str, Callable[[Any], bool]] = {
    "WandbCallback": lambda callback: str(getattr(callback._log_model, "value", callback._log_model)) != "checkpoint",
    "TrackioCallback": lambda callback: True,
    "MLflowCallback": lambda callback: not callback._log_artifacts,
    "NeptuneCallback": lambda callback: not callback._should_upload_checkpoint,
    "ClearMLCallback": lambda callback: not callback._log_model,
    "FlyteCallback": lambda callback: not callback.sync_checkpoints,
    "DVCLiveCallback": lambda callback: callback._log_model != "all",
    "SwanLabCallback": lambda callback: True,
}
"""When transformers' own callbacks leave the folder alone in on_save: as they are set up by default, most do."""


def uses_the_folder(callback: Any) -> bool:
    """Whether a Trainer callback may read or write the checkpoint in on_save: it has an on_save of its own."""
    from transformers import TrainerCallback

    on_save = type(callback).on_save
    if on_save is TrainerCallback.on_save:
        return False
    owner = on_save.__qualname__.partition(".")[0]
    if on_save.__module__ != "transformers.integrations.integration_utils" or owner not in _IDLE:
        return True
    try:
        return not _IDLE[owner](callback)
    except AttributeError:  # not set up yet, or of another version
        return True
