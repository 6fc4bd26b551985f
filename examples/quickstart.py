"""The whole workflow on a laptop, in a few minutes and with no GPU: make a small base model, train it with its experts
on two processes, stop, resume, consolidate, load the result with plain transformers.

    python examples/quickstart.py [--data DIR] [--output DIR]

It prints each command before it runs it; you would type the same commands. The exit code is 1 unless the model has
learned and the consolidated model equals the trained one.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from mistakes import Parser, told_in_one_line
from text import Blocks, add_data_arguments, losses_of_rows, read_texts, tokenize, unigram_entropy

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS_BEFORE, STEPS = 100, 200
SEQ_LEN, EVAL_SEQUENCES = 128, 128
LEARNED = 0.8  # the held-out loss must reach this fraction of the unigram entropy
SAME = 1e-3  # nats between the model as trained and as reloaded


def main() -> int:
    parser = Parser(description="Train, resume, consolidate and reload a small MoE on a laptop.")
    parser.add_argument("--output", default="runs/quickstart", metavar="DIR", help="(default: %(default)s)")
    add_data_arguments(parser)
    args = parser.parse_args()
    start_s = time.monotonic()
    output = Path(args.output)
    if output.exists():
        if others := sorted({path.name for path in output.iterdir()} - {"base", "run", "hub"}):
            raise ValueError(f"{output} holds {others[0]}, which no earlier run wrote. Give another --output.")
        say(f"removing {output} of an earlier run")
        shutil.rmtree(output)
    base, trained, hub = (str(output / name) for name in ("base", "run", "hub"))
    data = ["--max-megabytes", f"{args.max_megabytes:g}", *(["--data", args.data] if args.data else [])]

    say("1. A small Qwen3-MoE with random weights, and a tokenizer for its text")
    run("python", example("make_base.py"), base, *data)

    say("2. Train it with `moe_ep_degree: 2`: two processes, each with half of every layer's experts")
    train = ["accelerate", "launch", "--config_file", relative(REPOSITORY / "accelerate_configs" / "ep2_cpu.yaml")]
    train += [example("train.py"), "--model", base, "--output", trained, *data, "--seq-len", str(SEQ_LEN)]
    train += ["--eval-sequences", str(EVAL_SEQUENCES), "--lr", "3e-3", "--steps"]
    run(*train, str(STEPS_BEFORE))

    say("3. The same command with --resume goes on from the checkpoint")
    run(*train, str(STEPS), "--resume")

    say("4. Turn the sharded checkpoint into a Hub model")
    run("python", "-m", "accel_moe.consolidate", f"{trained}/checkpoint-{STEPS}", hub, base)

    say("5. Load it with plain transformers, in this one process")
    print(f">>> model = AutoModelForCausalLM.from_pretrained({hub!r})", flush=True)
    model, tokenizer = load(hub)
    _, held_out_texts = read_texts(args.data, args.max_megabytes)
    held_out = tokenize(held_out_texts, tokenizer, SEQ_LEN, EVAL_SEQUENCES)
    reloaded = held_out_loss(model, held_out)
    print(sample(model, tokenizer, "    def __init__(self, "))

    say(f"Done in {time.monotonic() - start_s:.0f} s")
    return report(read_metrics(trained), unigram_entropy(held_out), reloaded)


def report(metrics: list[dict], entropy: float, reloaded: float) -> int:
    """Print the losses. Returns 0 if the model learned, resumed and was reloaded as trained, else 1."""
    train = {line["step"]: line["train/loss"] for line in metrics if "train/loss" in line}
    held_out = {line["step"]: line["eval/loss"] for line in metrics if "eval/loss" in line}
    first_after = min(step for step in train if step > STEPS_BEFORE)
    first, trained = held_out[0], held_out[STEPS]
    print(f"training loss before the stop {train[STEPS_BEFORE]:.3f}, after the resume {train[first_after]:.3f}")
    print(f"held-out loss {first:.3f} at the start, {held_out[STEPS_BEFORE]:.3f} at the stop, {trained:.3f} at the end")
    print(f"unigram entropy of the held-out tokens {entropy:.3f}")
    print(f"held-out loss of the reloaded model {reloaded:.6f}, as trained {trained:.6f}")
    failures = []
    if not trained <= LEARNED * entropy:
        failures.append(f"held-out loss {trained:.3f}, expected at most {LEARNED} x {entropy:.3f}")
    if not abs(reloaded - trained) <= SAME:
        failures.append(f"the reloaded model's held-out loss is {abs(reloaded - trained):.1e} off, {SAME} allowed")
    if not train[first_after] <= (train[STEPS_BEFORE] + first) / 2:
        failures.append("the loss jumped at the resume")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def example(name: str) -> str:
    return relative(REPOSITORY / "examples" / name)


def relative(path: Path) -> str:
    """The path from the working directory, as a user would type it."""
    return os.path.relpath(path)


def run(*command: str) -> None:
    """Print a command and run it with this Python's own programs, on the CPU. Exits if it fails."""
    print(f"$ {shlex.join(command)}", flush=True)
    words = [sys.executable, *command[1:]] if command[0] == "python" else list(command)
    if command[0] == "accelerate":
        words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]]
    # On the CPU, also where there is a GPU: two processes need two, and one thread each on two cores.
    done = subprocess.run(words, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"FAILED: the command above ended with exit code {done.returncode}")


def load(folder: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, blocks: Blocks) -> float:
    batches = blocks.rows.split(16)
    return torch.cat([losses_of_rows(model(input_ids=rows).logits, rows) for rows in batches]).mean().item()


def sample(model: torch.nn.Module, tokenizer, start: str) -> str:
    torch.manual_seed(0)
    inputs = tokenizer(start, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.7, top_k=50)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def read_metrics(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    with told_in_one_line():
        sys.exit(main())
