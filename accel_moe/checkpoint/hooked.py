"""What hooks.py installs for checkpoints, as data: target, its parameters, wrapper, reason, tested versions.

Nothing is assigned here. Names that accelerate and Trainer import by name are wrapped where they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from accel_moe import supported
from accel_moe.checkpoint import background, for_accelerate, for_trainer


class Hooked(NamedTuple):
    """One row of hooks.py's table."""

    target: str
    parameters: tuple[str, ...]
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
    reason: str
    tested: str


_ACCELERATE, _TRAINER = supported.words("accelerate"), supported.words("transformers", "accelerate")
_SAVE_MODEL = ("fsdp_plugin", "accelerator", "model", "output_dir", "model_index", "adapter_only", "use_dcp")
_LOAD_MODEL = ("fsdp_plugin", "accelerator", "model", "input_dir", "model_index", "adapter_only", "use_dcp")
_SAVE_OPTIMIZER = (
    "fsdp_plugin",
    "accelerator",
    "optimizer",
    "model",
    "output_dir",
    "optimizer_index",
    "use_dcp",
)
_LOAD_OPTIMIZER = (
    "fsdp_plugin",
    "accelerator",
    "optimizer",
    "model",
    "input_dir",
    "optimizer_index",
    "adapter_only",
    "use_dcp",
)

HOOKED = (
    Hooked(
        "accelerate.Accelerator.save_state",
        ("self", "output_dir", "safe_serialization", "save_model_func_kwargs"),
        for_accelerate.wrap_save_state,
        "A crash while saving must leave the last checkpoint as it was: the folder appears by a rename, and "
        "rotation, "
        "which accelerate does before it writes, comes after. Its hooks run in the middle of a save.",
        _ACCELERATE,
    ),
    Hooked(
        "accelerate.Accelerator.load_state",
        ("self", "input_dir", "load_kwargs", "load_model_func_kwargs"),
        for_accelerate.wrap_load_state,
        "The folder is verified before the model is touched, and the newest one may be unfinished.",
        _ACCELERATE,
    ),
    Hooked(
        "accelerate.Accelerator.end_training",
        ("self",),
        for_accelerate.wrap_end_training,
        "It destroys the process group that a save in the background still uses.",
        _ACCELERATE,
    ),
    Hooked(
        "torch.distributed.ProcessGroup.shutdown",
        ("self",),
        background.wrap_shutdown,
        "destroy_process_group, which scripts import by name, ends the groups that a save in the background uses; "
        "it calls this first.",
        "torch 2.13",
    ),
    Hooked(
        "accelerate.accelerator.save_fsdp_model",
        _SAVE_MODEL,
        for_accelerate.wrap_save_fsdp_model,
        "DCP with checksums, and in the background; accelerate builds DCP's writer itself.",
        _ACCELERATE,
    ),
    Hooked(
        "accelerate.accelerator.save_fsdp_optimizer",
        _SAVE_OPTIMIZER,
        for_accelerate.wrap_save_fsdp_optimizer,
        "As for the model.",
        _ACCELERATE,
    ),
    Hooked(
        "accelerate.accelerator.load_fsdp_model",
        _LOAD_MODEL,
        for_accelerate.wrap_load_fsdp_model,
        "DCP leaves missing chunks uninitialised, and a missing file on one rank hangs the others.",
        _ACCELERATE,
    ),
    Hooked(
        "accelerate.accelerator.load_fsdp_optimizer",
        _LOAD_OPTIMIZER,
        for_accelerate.wrap_load_fsdp_optimizer,
        "As for the model.",
        _ACCELERATE,
    ),
    Hooked(
        "transformers.trainer.save_fsdp_model",
        _SAVE_MODEL,
        for_accelerate.wrap_save_fsdp_model,
        "Trainer never calls save_state: it imports these four by name.",
        _TRAINER,
    ),
    Hooked(
        "transformers.trainer.save_fsdp_optimizer",
        _SAVE_OPTIMIZER,
        for_accelerate.wrap_save_fsdp_optimizer,
        "As above.",
        _TRAINER,
    ),
    Hooked(
        "transformers.trainer.load_fsdp_model",
        _LOAD_MODEL,
        for_accelerate.wrap_load_fsdp_model,
        "As above.",
        _TRAINER,
    ),
    Hooked(
        "transformers.trainer.load_fsdp_optimizer",
        _LOAD_OPTIMIZER,
        for_accelerate.wrap_load_fsdp_optimizer,
        "As above.",
        _TRAINER,
    ),
    Hooked(
        "transformers.Trainer._save_checkpoint",
        ("self", "model", "trial"),
        for_trainer.wrap_save_checkpoint,
        "Model, optimizer, RNG and trainer state are one commit, and rotation follows it; on_save fires too late.",
        _TRAINER,
    ),
    Hooked(
        "transformers.Trainer._get_output_dir",
        ("self", "trial"),
        for_trainer.wrap_get_output_dir,
        "_save_checkpoint asks it where to write: into the temporary folder.",
        _TRAINER,
    ),
    Hooked(
        "transformers.Trainer._push_from_checkpoint",
        ("self", "checkpoint_folder"),
        for_trainer.wrap_push_from_checkpoint,
        "It uploads the folder that _save_checkpoint filled, which is renamed afterwards.",
        _TRAINER,
    ),
    Hooked(
        "transformers.Trainer._load_optimizer_and_scheduler",
        ("self", "checkpoint"),
        for_trainer.wrap_load_optimizer_and_scheduler,
        "The last step of a resume: what another world size could not restore is said there.",
        _TRAINER,
    ),
    Hooked(
        "transformers.Trainer.save_model",
        ("self", "output_dir", "_internal_call"),
        for_trainer.wrap_save_model,
        "With SHARDED_STATE_DICT it writes no weights and says nothing.",
        _TRAINER,
    ),
    Hooked(
        "transformers.Trainer.train",
        ("self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
        for_trainer.wrap_train,
        "All ranks resume from one checkpoint; and a save in the background ends, and its failure is raised, before "
        "train returns.",
        _TRAINER,
    ),
    Hooked(
        "transformers.Trainer._finalize_training",
        ("self", "trial", "num_train_samples", "start_time"),
        for_trainer.wrap_finalize_training,
        "It compares and deletes checkpoint folders, the last of which a save in the background may not have "
        "committed yet.",
        _TRAINER,
    ),
    Hooked(
        "transformers.trainer_callback.CallbackHandler.on_save",
        ("self", "args", "state", "control", "kwargs"),
        for_trainer.wrap_on_save,
        "Callbacks upload and add to the folder in on_save: it must be committed by then, in the background, too.",
        _TRAINER,
    ),
    Hooked(
        "transformers.trainer.get_last_checkpoint",
        ("folder",),
        for_trainer.wrap_get_last_checkpoint,
        "resume_from_checkpoint=True takes the highest number, committed or not, and each rank its own.",
        _TRAINER,
    ),
)
