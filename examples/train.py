"""Train a Mixture-of-Experts language model with accelerate: the usual loop, and a few lines for accel_moe.

    accelerate launch --config_file accelerate_configs/ep8.yaml examples/train.py --model Qwen/Qwen3-30B-A3B \
        --data my_texts --output runs/mine

The YAML says how many ranks share the experts (`moe_ep_degree`). This script is the same for every YAML, also for a
laptop's (accelerate_configs/ep2_cpu.yaml). `--resume` goes on from the newest checkpoint in --output. SIGTERM ends the
run after the step under way, with a checkpoint. `--lora 16` trains an adapter instead of the model, and
`--lora-experts` adapts the experts, too (docs/lora.md).

Under expert parallelism a forward is a collective: every rank must run the same number of forwards. Loaders that went
through accelerator.prepare see to it, in evaluation too.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import lora
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, is_tensorboard_available, set_seed
from arguments import parse_arguments
from mistakes import told_in_one_line
from text import losses_of_rows, read_texts, tokenize
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer, get_constant_schedule_with_warmup

import accel_moe
import accel_moe.cpu


@dataclass
class Progress:
    """The position in the training data; saved and loaded with the checkpoint."""

    step: int = 0
    epoch: int = 0
    batches_in_epoch: int = 0

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0])
    logging.basicConfig()
    logging.getLogger("accel_moe").setLevel(logging.INFO)  # logs the options in force and the mesh
    accel_moe.cpu.enable()  # FSDP2 on a machine without a GPU; does nothing on a machine with one
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        log_with="tensorboard" if is_tensorboard_available() else None,
        project_dir=args.output,
    )
    accelerator.init_trackers("tensorboard", config=vars(args))
    set_seed(args.seed)

    model = accel_moe.from_pretrained(args.model)  # accelerator.prepare reads the weights, into the shards
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train_texts, held_out_texts = read_texts(args.data, args.max_megabytes)
    train_loader = DataLoader(tokenize(train_texts, tokenizer, args.seq_len), args.batch_size, shuffle=True)
    eval_loader = DataLoader(tokenize(held_out_texts, tokenizer, args.seq_len, args.eval_sequences), args.batch_size)

    model = lora.with_adapter(model, args)
    model = accel_moe.prepare(model, **lora.options(args))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    # accelerate steps a prepared scheduler once per process
    scheduler = get_constant_schedule_with_warmup(optimizer, args.warmup * accelerator.num_processes)
    model, optimizer, scheduler, train_loader, eval_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, eval_loader
    )
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    metrics = Metrics(accelerator, Path(args.output))
    if args.resume:
        folder = accel_moe.newest_checkpoint(args.output)
        accelerator.load_state(str(folder))
        accelerator.print(f"resumed from {folder}")

    bar = tqdm(total=args.steps, initial=progress.step, disable=not accelerator.is_main_process, unit="step")
    if progress.step == 0:
        metrics.log(0, {"eval/loss": evaluate(accelerator, model, eval_loader)})
    window, load = Window(accelerator), accel_moe.ExpertLoadHistory()
    heatmap = Path(args.output, f"expert_load_from_step_{progress.step}.png")
    preemption, preempted = accel_moe.Preemption(resume="--resume"), False
    while progress.step < args.steps and not preempted:
        train_loader.set_epoch(progress.epoch)
        batches = accelerator.skip_first_batches(train_loader, progress.batches_in_epoch)
        for batch in batches:
            progress.batches_in_epoch += 1
            with accelerator.accumulate(model):
                loss = model(**batch, use_cache=False).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            window.add(loss, batch["input_ids"].numel())
            if not accelerator.sync_gradients:
                continue

            progress.step += 1
            bar.update()
            last, preempted = progress.step == args.steps, preemption.stops()
            if last or progress.step % args.log_every == 0:
                values = window.close() | {"train/grad_norm": float(norm), "train/lr": scheduler.get_last_lr()[0]}
                values |= load.measure(model, progress.step)  # a collective; evaluation's tokens are not in it
                metrics.log(progress.step, values)
                bar.set_postfix(summary(values))
            if (last or progress.step % args.eval_every == 0) and not preempted:
                metrics.log(progress.step, {"eval/loss": evaluate(accelerator, model, eval_loader)})
            if last or preempted or progress.step % args.save_every == 0:
                accelerator.save_state(str(Path(args.output, f"checkpoint-{progress.step}")))
                if accelerator.is_main_process:
                    load.write(heatmap)
            if last or preempted:
                break
        else:
            progress.epoch, progress.batches_in_epoch = progress.epoch + 1, 0
    bar.close()
    preemption.close(Path(args.output, f"checkpoint-{progress.step}"))
    accelerator.end_training()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> float:
    """Mean held-out loss in nats per token, without the load-balancing loss. A collective."""
    model.eval()
    losses = []
    for batch in loader:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        # the loader repeats samples so that every rank has a last batch; gather_for_metrics drops them
        losses.append(accelerator.gather_for_metrics(losses_of_rows(logits, batch["input_ids"])))
    model.train()
    return torch.cat(losses).mean().item()


class Window:
    """Losses and tokens since the last log line."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.clear()

    def clear(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.tokens = 0
        self.start_s = time.perf_counter()

    def add(self, loss: torch.Tensor, tokens: int) -> None:
        self.losses.append(loss.detach())
        self.tokens += tokens

    def close(self) -> dict[str, float]:
        """Metrics of the window over all ranks; starts the next window. A collective."""
        loss = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
        seconds = time.perf_counter() - self.start_s
        tokens_per_s = self.tokens * self.accelerator.num_processes / seconds
        self.clear()
        return {"train/loss": loss, "train/tokens_per_s": tokens_per_s}


def summary(values: dict[str, float]) -> dict[str, str]:
    return {
        "loss": f"{values['train/loss']:.3f}",
        "tokens/s": f"{values['train/tokens_per_s']:.0f}",
        "busiest expert": f"{values.get('expert_load/busiest_share', 0):.0%}",
    }


class Metrics:
    """Each log goes to accelerate's trackers and, one JSON object a line, to OUTPUT/metrics.jsonl."""

    def __init__(self, accelerator: Accelerator, output: Path):
        self.accelerator = accelerator
        self.path = output / "metrics.jsonl"

    def log(self, step: int, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            if "eval/loss" in values:
                tqdm.write(f"step {step}: held-out loss {values['eval/loss']:.4f}")


if __name__ == "__main__":
    with told_in_one_line():
        main()
