"""Train on sequences too long for one GPU: several GPUs share each of them, and the experts.

    accelerate launch --config_file accelerate_configs/ep8_cp4.yaml examples/train_long_context.py \
        --model Qwen/Qwen3-30B-A3B --data my_texts --output runs/long --seq-len 32768

The YAML says how many GPUs share a sequence (`parallelism_config_cp_size`) and the experts (`moe_ep_degree`); the loop
has one line more than examples/train.py. It runs on a laptop, too, with accelerate_configs/ep2_cp2_cpu.yaml and the
short sequences that are the default. docs/long_context.md tells of Trainer and of what cannot be split.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from mistakes import Parser, at_least, told_in_one_line
from text import add_data_arguments, read_texts, tokenize
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import accel_moe
import accel_moe.cpu


def main() -> None:
    args = parse_arguments()
    accel_moe.cpu.enable()  # FSDP2 on a machine without a GPU; does nothing on a machine with one
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation)
    set_seed(args.seed)
    model = accel_moe.from_pretrained(args.model, attn_implementation="sdpa")  # the one that can run as a ring
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts, _ = read_texts(args.data, args.max_megabytes)
    loader = DataLoader(tokenize(texts, tokenizer, args.seq_len), args.batch_size, shuffle=True)

    model = accel_moe.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    # the loader gives all ranks that share a sequence the same batch
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    step, output = 0, Path(args.output)
    while step < args.steps:
        for batch in loader:
            with accelerator.accumulate(model), accel_moe.context_parallel(accelerator, batch) as part:
                loss = model(**part, use_cache=False).loss
                accelerator.backward(loss)  # inside: checkpointed layers run their attention again
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            mean = accelerator.reduce(loss.detach(), "mean").item()  # each rank has the loss of its own part
            log(accelerator, output, {"step": step, "loss": mean, "grad_norm": float(norm)})
            if step == args.steps:
                break
    accelerator.save_state(str(output / f"checkpoint-{step}"))
    accelerator.end_training()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="the base model")
    parser.add_argument("--output", required=True, metavar="DIR", help="checkpoint and metrics")
    parser.add_argument(
        "--seq-len", type=at_least(2), default=128, help="tokens of a whole sequence, a multiple of 2 x cp_size"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=1, help="sequences of each cp group and forward")
    parser.add_argument("--gradient-accumulation", type=at_least(1), default=1, help="forwards per optimizer step")
    parser.add_argument("--steps", type=at_least(1), default=20, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    add_data_arguments(parser)
    return parser.parse_args()


def log(accelerator: Accelerator, output: Path, values: dict[str, float]) -> None:
    """One JSON object a line, to OUTPUT/metrics.jsonl."""
    if accelerator.is_main_process:
        print(values, flush=True)
        output.mkdir(parents=True, exist_ok=True)
        with (output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    with told_in_one_line():
        main()
