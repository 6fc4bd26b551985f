"""examples/train.py through transformers.Trainer: `accel_moe.prepare(model)` is the one added line.

    accelerate launch --config_file accelerate_configs/ep8.yaml examples/train_trainer.py --model Qwen/Qwen3-30B-A3B \
        --data my_texts --output runs/mine

FSDP, mixed precision and the mesh come from the YAML; TrainingArguments says nothing of them. `--resume` goes on from
the newest checkpoint in --output.
"""

from __future__ import annotations

import argparse
import logging

from accelerate.utils import is_tensorboard_available
from text import add_data_arguments, read_texts, tokenize
from transformers import AutoTokenizer, Trainer, TrainingArguments

import accel_moe
import accel_moe.cpu


class TrainerWithExpertLoad(Trainer):
    """Adds the busiest expert's share of its layer's tokens to every line of training metrics."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        load = accel_moe.expert_load(self.model)  # a collective: Trainer logs at the same steps on every rank
        if "loss" in logs:  # else this is an evaluation's line, and its tokens are now forgotten
            busiest = max(float(counts.max() / counts.sum().clamp(min=1)) for counts in load.values())
            logs = {**logs, "busiest_expert_share": busiest}
        super().log(logs, start_time)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a Mixture-of-Experts language model with transformers.Trainer.")
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="what to start from")
    parser.add_argument("--output", required=True, metavar="DIR", help="checkpoints and tensorboard")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps, those before a resume included")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per process and forward")
    parser.add_argument("--gradient-accumulation", type=int, default=1, help="forwards per optimizer step")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--warmup", type=int, default=20, help="steps until --lr is reached")
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--eval-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--eval-sequences", type=int, default=128, help="how much held-out text to evaluate on")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    add_data_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.basicConfig()
    logging.getLogger("accel_moe").setLevel(logging.INFO)  # what is in force, and how experts are sharded
    accel_moe.cpu.enable()  # FSDP2 on a machine without a GPU; does nothing on one with
    training = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        learning_rate=args.lr,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=args.warmup,
        logging_steps=args.log_every,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        prediction_loss_only=True,
        save_steps=args.save_every,
        report_to="tensorboard" if is_tensorboard_available() else "none",
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train_texts, held_out_texts = read_texts(args.data, args.max_megabytes)
    model = accel_moe.from_pretrained(args.model)
    model.config.use_cache = False  # with activation checkpointing a layer runs twice, and must not fill a cache
    model = accel_moe.prepare(model)
    trainer = TrainerWithExpertLoad(
        model=model,
        args=training,
        train_dataset=tokenize(train_texts, tokenizer, args.seq_len),
        eval_dataset=tokenize(held_out_texts, tokenizer, args.seq_len, args.eval_sequences),
    )
    trainer.train(resume_from_checkpoint=args.resume)


if __name__ == "__main__":
    main()
