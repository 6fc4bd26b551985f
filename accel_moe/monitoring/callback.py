"""The experts' load in the logs of Trainer and of TRL's trainers.

    trainer = Trainer(..., callbacks=[accel_moe.ExpertLoadCallback()])

Its numbers stand in the training line itself: beside the loss in `state.log_history`, and with it in every integration
of `report_to`. Trainer calls `on_log` too late for that: log_history and the integrations have the line by then. So
`Trainer.log` is replaced, for trainers that have this callback.

A training line is already a collective, in which Trainer gathers the loss at every `logging_steps`. So all ranks
measure at the same steps. Only the main rank keeps a history and draws.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback

from accel_moe.experts.expert_counts import forget_counts, trained_tokens_per_expert
from accel_moe.experts.state import holds_experts
from accel_moe.monitoring.heatmap import ExpertLoadHistory, pixels_of, warn_once
from accel_moe.monitoring.statistics import is_of_one_layer, metrics_of
from accel_moe.patching import TRAINER, patch


class ExpertLoadCallback(TrainerCallback):
    """Adds the numbers of `expert_load_metrics` to every training line of a Trainer.

    The heatmap is drawn at each evaluation, at each checkpoint and at the end: `expert_load.png` in the output folder,
    `expert_load_from_step_<n>.png` in a run that was resumed, and an image in wandb and tensorboard if the run reports
    to them. Without matplotlib there is no heatmap, and one warning.

    Give it as the last of `callbacks=[...]`: after the integrations have the line, it takes the numbers of single
    layers out of it, so that the console shows only those over all layers.

    Args:
        heatmap: whether to draw.
    """

    def __init__(self, heatmap: bool = True):
        self.heatmap = heatmap
        self.history = ExpertLoadHistory()
        self._path: Path | None = None
        self._reporters: list[Any] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if model is None or not holds_experts(model):
            raise ValueError(
                "ExpertLoadCallback got a model that accel_moe.prepare() has not seen. Call prepare(model) before "
                "Trainer(model=model, ...)."
            )
        forget_counts(model)
        self.history, begin = ExpertLoadHistory(), state.global_step
        name = f"expert_load_from_step_{begin}.png" if begin else "expert_load.png"
        self._path = Path(args.output_dir, name) if self.heatmap and state.is_world_process_zero else None

    def extend(self, logs: dict[str, float], trainer: Any) -> None:
        """Puts the numbers since the last line into this one. A collective."""
        counts = trained_tokens_per_expert(trainer.model, "ExpertLoadCallback")
        logs.update(metrics_of(counts))
        if self._path is not None:
            self.history.add(counts, trainer.state.global_step)
            self._reporters = trainer.callback_handler.callbacks

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = {} if logs is None else logs
        for name in list(filter(is_of_one_layer, logs)):
            del logs[name]

    def on_evaluate(self, args, state, control, **kwargs):
        self._draw(state)

    def on_save(self, args, state, control, **kwargs):
        self._draw(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(state)
        self._path = None

    def _draw(self, state: Any) -> None:
        if self._path is not None and self.history.write(self._path):
            try:
                self._send(state.global_step)
            except Exception as error:  # a tracker's: a picture ends no training
                warn_once(f"No tracker got the heatmap of the expert load: {type(error).__name__}: {error}.")

    def _send(self, step: int) -> None:
        from transformers.integrations import TensorBoardCallback, WandbCallback

        wandb = sys.modules.get("wandb")
        for reporter in self._reporters:
            if isinstance(reporter, TensorBoardCallback) and reporter.tb_writer is not None:
                image = pixels_of(self.history.figure())
                reporter.tb_writer.add_image("train/expert_load", image, step, dataformats="HWC")
            elif isinstance(reporter, WandbCallback) and wandb is not None and wandb.run is not None:
                wandb.log({"train/expert_load_heatmap": wandb.Image(str(self._path)), "train/global_step": step})


@patch(
    "transformers.Trainer.log",
    why="log_history and the integrations of report_to have a line before any callback of the user's sees it.",
    tested=TRAINER,
)
def log(original, self, logs, start_time=None):
    if "loss" in logs and self.is_in_train:  # a training line; an evaluation's has eval_loss
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExpertLoadCallback):
                callback.extend(logs, self)
    return original(self, logs, start_time)
