"""A parity case through transformers.Trainer: the same three steps, gradients read before the optimizer's."""

from __future__ import annotations

import tempfile

import torch

from tests.distributed.parity import (
    LEARNING_RATE,
    MAX_NORM,
    STEPS,
    Case,
    Run,
    batches_of,
    build,
    clean,
    labels_of,
    optimizer_of,
    whole,
)
from tests.tiny import batches, decoder_layer_names


class InOrder(torch.utils.data.Dataset):
    """The rows of all batches, one after the other."""

    def __init__(self, case: Case | None = None):
        case = case or Case(1, 1)
        self.rows = torch.cat(batches_of(case))
        self.labels = torch.cat([labels_of(case, batch) for batch in batches_of(case)])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.labels[i]}


def trainer_arguments(case: Case, folder: str, model, **more):
    from accelerate.parallelism_config import ParallelismConfig
    from transformers import TrainingArguments

    batch = len(batches(1)[0]) // (case.world // case.cp)
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        max_grad_norm=MAX_NORM,
        lr_scheduler_type="constant",
        learning_rate=LEARNING_RATE,
        report_to=[],
        disable_tqdm=True,
        fsdp=True,
        fsdp_config={
            "fsdp_version": 2,
            "transformer_layer_cls_to_wrap": decoder_layer_names(model),
            "cpu_ram_efficient_loading": case.ram_efficient,
            "state_dict_type": "SHARDED_STATE_DICT",
        },
        parallelism_config=ParallelismConfig(dp_shard_size=case.world // case.cp, cp_size=case.cp),
        **{"max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", **more},
    )


def train_with_trainer(case: Case) -> Run | None:
    from transformers import Trainer, TrainerCallback

    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = build(case)
    accel_moe.prepare(model, moe_ep_degree=case.ep, moe_kernel=case.kernel)
    gradients, losses, norms = {}, [], []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])
                norms.append(logs["grad_norm"])

    class InOrderTrainer(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def create_optimizer(self, *args, **kwargs):
            if self.optimizer is None:
                self.optimizer = optimizer_of(self.model, case)
            return self.optimizer

        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if not gradients:
                gradients.update({clean(n): whole(p.grad) for n, p in model.named_parameters()})
            return loss

    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrderTrainer(
            model=model,
            args=trainer_arguments(case, folder, model),
            train_dataset=InOrder(case),
            callbacks=[Watch()],
        )
        trainer.train()
    weights = {clean(n): whole(p) for n, p in trainer.model.named_parameters()}
    return Run(losses, norms, gradients, weights, {}) if trainer.accelerator.process_index == 0 else None


UNEVEN_ROWS = 7
"""Rows of the dataset that evaluate_with_trainer reads, BATCH at a time: the last batch has one."""
BATCH = 3


def evaluate_with_trainer(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """(eval_loss, tokens_per_expert) of a model that Trainer evaluates untrained."""
    from transformers import Trainer

    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = build(case)
    accel_moe.prepare(model, moe_ep_degree=case.ep, moe_kernel=case.kernel)
    rows = torch.utils.data.Subset(InOrder(case), range(UNEVEN_ROWS))
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(case, folder, model, per_device_eval_batch_size=BATCH)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.create_optimizer()
        trainer.model_wrapped = trainer.model = trainer.accelerator.prepare(model, trainer.optimizer)[0]
        loss = trainer.evaluate()["eval_loss"]
    return loss, accel_moe.tokens_per_expert(trainer.model)


def evaluate_in_one_process(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """The same; Trainer takes the mean over the rows of each batch's mean over its labels."""
    import accel_moe

    model, data, total = accel_moe.prepare(build(case)).eval(), InOrder(case), 0.0
    for start in range(0, UNEVEN_ROWS, BATCH):
        rows = range(start, min(start + BATCH, UNEVEN_ROWS))
        ids, labels = (torch.stack([data[i][name] for i in rows]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * len(rows)
    return total / UNEVEN_ROWS, accel_moe.tokens_per_expert(model)
