"""The command line that the training scripts share."""

from __future__ import annotations

import argparse

from lora import add_lora_arguments
from text import add_data_arguments


def parse_arguments(description: str) -> argparse.Namespace:
    """The options of a training script; `description` heads its --help."""
    return training_parser(description).parse_args()


def training_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the shared options, to which a script may add its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="the base model")
    parser.add_argument("--output", required=True, metavar="DIR", help="checkpoints and metrics")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps, including those before a resume")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per process and forward")
    parser.add_argument("--gradient-accumulation", type=int, default=1, help="forwards per optimizer step")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--warmup", type=int, default=20, help="steps until --lr is reached")
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--eval-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--eval-sequences", type=int, default=128, help="held-out sequences per evaluation")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    add_lora_arguments(parser)
    add_data_arguments(parser)
    return parser
