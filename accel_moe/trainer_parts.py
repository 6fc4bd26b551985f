"""Context parallelism in transformers' Trainer: it splits batches itself, and here is said what it must not split.

Training and the loss of an evaluation are those of whole sequences. Logits and labels of an evaluation are not: Trainer
would gather each rank's part as if it were a sequence.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.distributed as dist
from torch import Tensor

from accel_moe.long_context import cp_size, refusing
from accel_moe.patching import TRAINER, patch
from accel_moe.ring_limits import OFF, check_batch, check_names, refuse_packed, text_positions

SETTINGS = (bool, int, float, str, type(None))
"""The types of a model's arguments, such as use_cache, that Trainer hands on with a batch."""


@patch(
    "transformers.Trainer._prepare_context_parallel_inputs",
    why="Packed sequences and padding on the left train on wrong attention without a word: accelerate leaves out the "
    "mask that would part them. Losses that shift the labels themselves shift them inside of a rank's part.",
    tested=TRAINER,
)
def _prepare_context_parallel_inputs(original, self, model, inputs):
    if (size := cp_size(self.accelerator)) > 1:
        with refusing(self.accelerator):
            _check_inputs(self, inputs, size)
    return original(self, model, inputs)


def _check_inputs(trainer: Any, inputs: Any, size: int) -> None:
    _check_loss(trainer, size)
    if "cu_seq_lens_q" in inputs:  # a collator says so where it has flattened a batch
        refuse_packed(size)
    check_names(inputs, type(trainer).__name__, SETTINGS)
    if isinstance(inputs.get("position_ids"), Tensor):
        inputs["position_ids"] = text_positions(inputs["position_ids"], size)
    if isinstance(inputs.get("input_ids"), Tensor):
        check_batch(inputs, size)


def _check_loss(trainer: Any, size: int) -> None:
    """Raises ValueError: the loss is not the model's own, which takes the labels that were shifted before the split."""
    factor = getattr(trainer.args, "label_smoothing_factor", 0.0)
    if factor:
        found, mend = f"label_smoothing_factor={factor}", "label_smoothing_factor=0"
    elif getattr(trainer, "compute_loss_func", None) is not None:
        found, mend = "compute_loss_func", "no compute_loss_func"
    else:
        return
    raise ValueError(
        f"{found} shifts the labels inside of each rank's part under cp_size={size}, and would lose and mix labels "
        f"where the parts meet. Give {mend}, or {OFF}."
    )


@patch(
    "transformers.Trainer.prediction_step",
    why="The split overwrites the labels that Trainer keeps for the metrics, and the logits are a rank's part; the "
    "loss is a part's, too, and evaluation takes one rank's.",
    tested=TRAINER,
)
def prediction_step(original, self, model, inputs, prediction_loss_only, ignore_keys=None):
    size = cp_size(self.accelerator)
    if size > 1 and not prediction_loss_only:
        raise ValueError(
            f"Trainer.predict() and compute_metrics need whole logits and labels, and cp_size={size} splits them. "
            f"Evaluate without compute_metrics (prediction_loss_only=True), or {OFF}."
        )
    loss, logits, labels = original(self, model, inputs, prediction_loss_only, ignore_keys)
    if size > 1 and loss is not None:
        loss = _mean_over_cp(self.accelerator, loss)
    return loss, logits, labels


def _mean_over_cp(accelerator: Any, loss: Tensor) -> Tensor:
    """The loss of the whole sequences, on each of the ranks that share them. A collective over cp."""
    mesh = accelerator.torch_device_mesh["cp"]
    whole = loss.detach().clone()
    dist.all_reduce(whole, group=mesh.get_group())
    return whole / mesh.size()


@patch(
    "transformers.Trainer.evaluation_loop",
    why="gather_for_metrics cuts the last batch to its rows, but counts the copies of all other batches: under context "
    "parallelism the last batch weighs too little.",
    tested=TRAINER,
)
def evaluation_loop(
    original, self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
):
    if (size := cp_size(self.accelerator)) > 1:  # the loop puts its own back at the end
        if self.args.eval_use_gather_object:
            raise ValueError(
                f"eval_use_gather_object=True is not supported with cp_size={size}: objects of ranks that share a "
                f"batch would count several times. Leave it out, or {OFF}."
            )
        self.gather_function = functools.partial(_gather_one_of_each, self.accelerator)
    return original(self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)


def _gather_one_of_each(accelerator: Any, data: Any) -> Any:
    """gather_for_metrics, of one of the ranks that share a batch. A collective of all ranks."""
    from accelerate.utils.operations import recursively_apply

    state, loaders = accelerator.gradient_state, accelerator.num_processes // cp_size(accelerator)
    rows = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

    def first(whole: Tensor) -> Tensor:
        return whole.unflatten(0, (loaders, -1, len(whole) // accelerator.num_processes))[:, 0].flatten(0, 1)[:rows]

    return recursively_apply(first, accelerator.gather(data))
