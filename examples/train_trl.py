"""Fine-tune a Mixture-of-Experts model with TRL: SFT on conversations, DPO on preferences, GRPO on a reward.

    accelerate launch --config_file accelerate_configs/ep8.yaml examples/train_trl.py --method sft \
        --model Qwen/Qwen3-30B-A3B --data my_texts --output runs/mine

FSDP, mixed precision, activation checkpointing and the mesh come from the YAML. TRL's own defaults for them are turned
off below. `--method sft` trains on the assistant's tokens alone, without padding; `--packing` also fills each row up to
--seq-len. `--method dpo` shards a frozen reference as it does the policy; with `--lora 16` the reference is the policy
without its adapter. `--method grpo` generates with transformers. `--resume` goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import chats
import lora
import torch
from accelerate import Accelerator
from arguments import trainer_arguments, training_parser
from datasets import Dataset
from mistakes import at_least, told_in_one_line
from text import read_texts
from torch import nn
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import accel_moe
import accel_moe.cpu


def main() -> None:
    parser = training_parser(__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["sft", "dpo", "grpo"], required=True)
    parser.add_argument("--packing", action="store_true", help="fill each row with conversations (SFT)")
    parser.add_argument("--beta", type=float, default=0.1, help="how close DPO keeps the policy to the reference")
    parser.add_argument("--generations", type=at_least(2), default=4, help="completions of a prompt (GRPO)")
    args = parser.parse_args()
    logging.basicConfig()
    logging.getLogger("accel_moe").setLevel(logging.INFO)  # logs the options in force and the mesh
    accel_moe.cpu.enable()  # FSDP2 on a machine without a GPU; does nothing on a machine with one

    model = accel_moe.from_pretrained(args.model)  # the trainer's accelerator reads the weights, into the shards
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = tokenizer.chat_template or chats.CHAT_TEMPLATE
    model.config.use_cache = False  # activation checkpointing runs a layer twice, which a cache does not allow
    options: dict[str, Any] = {
        "processing_class": tokenizer,
        "peft_config": lora.adapter_config(model, args),
        "callbacks": [accel_moe.PreemptionCallback(resume="--resume"), accel_moe.ExpertLoadCallback()],
    }
    model = accel_moe.prepare(model, **lora.options(args))
    trainer = {"sft": sft, "dpo": dpo, "grpo": grpo}[args.method](model, args, options)
    trainer.train(resume_from_checkpoint=args.resume)


def sft(model: nn.Module, args: argparse.Namespace, options: dict[str, Any]) -> SFTTrainer:
    training = SFTConfig(
        **shared(args),
        **evaluation(args),
        assistant_only_loss=True,
        padding_free=True,
        packing=args.packing,
        max_length=args.seq_len if args.packing else None,  # padding-free rows have the length that they have
    )
    return SFTTrainer(model=model, args=training, **datasets(chats.conversations, args), **options)


def dpo(model: nn.Module, args: argparse.Namespace, options: dict[str, Any]) -> DPOTrainer:
    training = DPOConfig(**shared(args), **evaluation(args), beta=args.beta, max_length=args.seq_len)
    reference = None if args.lora else sharded_reference(args.model)
    data = datasets(chats.preferences, args)
    return DPOTrainer(model=model, ref_model=reference, args=training, **data, **options)


def grpo(model: nn.Module, args: argparse.Namespace, options: dict[str, Any]) -> GRPOTrainer:
    training = GRPOConfig(
        **shared(args),
        num_generations=args.generations,
        max_completion_length=args.seq_len // 2,
        generation_kwargs={"use_cache": True},  # the model's config turned it off, for training
    )
    data = {"train_dataset": datasets(chats.tasks, args)["train_dataset"]}
    return GRPOTrainer(model=model, args=training, reward_funcs=chats.reward, **data, **options)


def sharded_reference(base: str) -> nn.Module:
    """The base, frozen, its experts on their ranks. TRL alone would load it whole on every rank. A collective."""
    reference = accel_moe.prepare(accel_moe.from_pretrained(base))
    unused = torch.optim.SGD(reference.parameters())  # accelerate shards no model without an optimizer
    reference, _ = Accelerator().prepare(reference, unused)
    return reference.eval().requires_grad_(False)


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that all three methods have."""
    # the YAML's mixed_precision and fsdp_activation_checkpointing hold
    return trainer_arguments(args) | {"bf16": False, "gradient_checkpointing": False}


def evaluation(args: argparse.Namespace) -> dict[str, Any]:
    return dict(
        eval_strategy="steps",
        eval_steps=args.eval_every,
        per_device_eval_batch_size=args.batch_size,
        prediction_loss_only=True,
    )


def datasets(rows_of: Any, args: argparse.Namespace) -> dict[str, Dataset]:
    """The trainers' two datasets of the rows that `rows_of` makes of texts."""
    train, held_out = read_texts(args.data, args.max_megabytes)
    return {
        "train_dataset": Dataset.from_list(rows_of(train, args.seq_len)),
        "eval_dataset": Dataset.from_list(rows_of(held_out, args.seq_len)[: args.eval_sequences]),
    }


if __name__ == "__main__":
    with told_in_one_line():
        main()
