"""The command line that the training scripts share."""

from __future__ import annotations

import argparse
from typing import Any

from accelerate.utils import is_tensorboard_available
from lora import add_lora_arguments
from mistakes import Parser, at_least
from text import add_data_arguments


def parse_arguments(description: str) -> argparse.Namespace:
    """The options of a training script; `description` heads its --help."""
    return training_parser(description).parse_args()


def training_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the shared options, to which a script may add its own."""
    parser = Parser(description=description)
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="the base model")
    parser.add_argument("--output", required=True, metavar="DIR", help="checkpoints and metrics")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    parser.add_argument("--steps", type=at_least(1), default=300, help="optimizer steps, with those before a resume")
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="sequences per process and forward")
    parser.add_argument("--gradient-accumulation", type=at_least(1), default=1, help="forwards per optimizer step")
    parser.add_argument("--seq-len", type=at_least(2), default=128, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--warmup", type=at_least(0), default=20, help="steps until --lr is reached")
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--log-every", type=at_least(1), default=10, metavar="STEPS")
    parser.add_argument("--eval-every", type=at_least(1), default=100, metavar="STEPS")
    parser.add_argument("--eval-sequences", type=at_least(1), default=128, help="held-out sequences per evaluation")
    parser.add_argument("--save-every", type=at_least(1), default=100, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    add_lora_arguments(parser)
    add_data_arguments(parser)
    return parser


def trainer_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as the fields of TrainingArguments that Trainer and TRL's trainers share."""
    return dict(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        learning_rate=args.lr,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=args.warmup,
        logging_steps=args.log_every,
        save_steps=args.save_every,
        report_to="tensorboard" if is_tensorboard_available() else "none",
    )
