"""examples/train.py through transformers.Trainer: `accel_moe.prepare(model)` is the one line it needs.

    accelerate launch --config_file accelerate_configs/ep8.yaml examples/train_trainer.py --model Qwen/Qwen3-30B-A3B \
        --data my_texts --output runs/mine

FSDP, mixed precision and the mesh come from the YAML, not from TrainingArguments. `--resume` goes on from the newest
checkpoint in --output. SIGTERM ends the run after the step under way, with a checkpoint.
"""

from __future__ import annotations

import logging

import lora
from arguments import parse_arguments, trainer_arguments
from mistakes import told_in_one_line
from text import read_texts, tokenize
from transformers import AutoTokenizer, Trainer, TrainingArguments

import accel_moe
import accel_moe.cpu


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0])
    logging.basicConfig()
    logging.getLogger("accel_moe").setLevel(logging.INFO)  # logs the options in force and the mesh
    accel_moe.cpu.enable()  # FSDP2 on a machine without a GPU; does nothing on a machine with one
    training = TrainingArguments(
        **trainer_arguments(args),
        per_device_eval_batch_size=args.batch_size,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        prediction_loss_only=True,
    )
    model = accel_moe.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train_texts, held_out_texts = read_texts(args.data, args.max_megabytes)
    model.config.use_cache = False  # activation checkpointing runs a layer twice, which a cache does not allow
    model = lora.with_adapter(model, args)
    model = accel_moe.prepare(model, **lora.options(args))
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=tokenize(train_texts, tokenizer, args.seq_len),
        eval_dataset=tokenize(held_out_texts, tokenizer, args.seq_len, args.eval_sequences),
        callbacks=[
            accel_moe.PreemptionCallback(resume="--resume"),
            accel_moe.ExpertLoadCallback(),  # the load of the experts in every line, and as a heatmap
        ],
    )
    trainer.train(resume_from_checkpoint=args.resume)


if __name__ == "__main__":
    with told_in_one_line():
        main()
