"""One training step of the same model, three ways: our EP, accelerate FSDP2 with grouped_mm, transformers' own EP.

    python examples/benchmarks/bench_train.py --gpus "1 2"                    # the scenarios in scenarios.yaml
    python examples/benchmarks/bench_train.py --only mixtral_8x7b_2_layers --results examples/benchmarks/RESULTS.md

Each (scenario, number of GPUs, way) runs in processes of its own: random weights from one seed, fp32 master weights,
bf16 compute, fused AdamW, no clipping, no activation checkpointing, random tokens. Reported: the median time of a step
from CUDA event to CUDA event, with no synchronisation in between, as a training loop runs; tokens/s/GPU, and how many
times those of the fastest peer; the greatest peak memory of a rank over the timed steps, and the part it is of that
peer's; and the loss of the last step (alike for all ways, or something is wrong). One more step, after those that are
timed, runs under the profiler: where rank 0's GPU spent it, by kind of kernel (the times overlap, and idle is none of
them; a collective's time includes the wait for the other ranks). The table is printed and, with --results, replaces
this benchmark's section in that file, with a chart beside it. On a machine without a GPU it runs on gloo ranks, to try
the script out.

A way that this installation does not have, and one that runs out of memory, get a row that says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from common import kernels_of, replace_section

HERE = Path(__file__).resolve().parent
WARMUP_STEPS = 4
OURS, FSDP2, TRANSFORMERS_EP = "accel_moe", "FSDP2 + grouped_mm", "transformers EP"
GPU = torch.cuda.is_available()
KINDS = {
    "expert GEMMs": (
        "up_projection",
        "grouped_rows",
        "down_backward",
        "weight_grad",
        "grouped",
        "enable_3x_kernel_for_sm9x",  # torch's grouped_mm
    ),
    "routing, sums": (
        "slots",
        "list_tiles",
        "gather_rows",
        "sum_",
        "zero_tail",
        "dot_bias",
        "sort",
        "scatter",
        "index",
    ),
    "all-to-all": ("SendRecv", "AllToAll"),
    # FSDP's, and an exchange's by all-gather
    "gathers, reductions": ("AllGather", "ReduceScatter", "AllReduce", "split_with_sizes", "chunk_cat"),
    "optimizer": ("FusedAdam", "multi_tensor"),
    "dense GEMMs": ("nvjet", "gemm", "cublas"),
    "attention": ("fmha", "flash", "attention"),
    "casts, copies": ("copy", "Memcpy", "CatArray"),
}
"""Kinds of kernels, each by words in their names; the first kind with a word in the name counts."""


@dataclass(frozen=True)
class Scenario:
    """One entry of the scenarios file."""

    name: str
    model_type: str
    config: dict[str, Any]
    batch_size: int
    seq_len: int
    lora_rank: int = 0
    """LoRA of this rank on attention, everything else frozen; 0 trains all weights."""
    least_gpus: int = 1
    """With fewer it is left out."""

    def model_config(self):
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **self.config)

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len


def read_scenarios(path: Path) -> dict[str, Scenario]:
    return {name: Scenario(name, **fields) for name, fields in yaml.safe_load(path.read_text()).items()}


# ---- The parent: starts ranks, collects, writes the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", default="2", help='numbers of GPUs to run on, such as "1 2" (default: %(default)s)')
    parser.add_argument("--scenarios", type=Path, default=HERE / "scenarios.yaml", metavar="YAML")
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", help="some of the scenarios")
    parser.add_argument("--ways", nargs="+", default=[OURS, FSDP2, TRANSFORMERS_EP], metavar="WAY")
    parser.add_argument("--steps", type=int, default=12, help="timed steps (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="MARKDOWN", help="file to write the section into")
    parser.add_argument("--worker", nargs=3, metavar=("WAY", "SCENARIO", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    scenarios = read_scenarios(args.scenarios)
    if args.worker:
        way, name, folder = args.worker
        return work(way, scenarios[name], Path(folder), args.steps)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or scenarios:
            for gpus in map(int, args.gpus.split()):
                for way in args.ways:
                    result = run_way(args, way, name, gpus, Path(folder))
                    rows.append((name, gpus, way, result))
                    print(f"{name}, {gpus} GPU(s), {way}: {result}", flush=True)
    section = report(rows, scenarios, f"python {os.path.relpath(__file__)} {' '.join(map(quoted, sys.argv[1:]))}")
    print(f"\n{section}")
    if args.results:
        replace_section(args.results, "bench_train", "A training step", section)
        chart(rows, scenarios, args.results.with_name("train.png"))


def run_way(args: argparse.Namespace, way: str, name: str, gpus: int, folder: Path) -> dict[str, Any]:
    """Start the ranks of one way; what rank 0 measured, or {"why_not": …}."""
    if gpus < (least := read_scenarios(args.scenarios)[name].least_gpus):
        return {"why_not": f"needs {least} GPUs"}
    if way == TRANSFORMERS_EP and (why := no_transformers_ep(gpus)):
        return {"why_not": why}
    if way == TRANSFORMERS_EP and read_scenarios(args.scenarios)[name].lora_rank:
        return {"why_not": "it shards while it loads, before there are adapters"}
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    command += [__file__, "--scenarios", str(args.scenarios), "--steps", str(args.steps)]
    if way == TRANSFORMERS_EP and not (folder / name).exists():  # it trains only what it loads itself
        write = [sys.executable, __file__, "--scenarios", str(args.scenarios), "--worker", "write", name, str(folder)]
        subprocess.run(write, check=True)
    done = subprocess.run([*command, "--worker", way, name, str(folder)], capture_output=True, text=True)
    if result.exists() and done.returncode == 0:
        return json.loads(result.read_text())
    if "out of memory" in done.stderr.lower():
        return {"why_not": "out of memory"}
    print(done.stdout[-3000:] + done.stderr[-6000:], file=sys.stderr)
    return {"why_not": f"failed with exit code {done.returncode}"}


def no_transformers_ep(gpus: int) -> str | None:
    if gpus == 1:
        return "needs 2 GPUs"
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return "not in this transformers"
    return None if "ep_size" in DistributedConfig.__dataclass_fields__ else "not in this transformers"


def report(rows: list[tuple[str, int, str, dict[str, Any]]], scenarios: dict[str, Scenario], command: str) -> str:
    """The Markdown section: how it was measured, then one row per way, with its ratios to the fastest peer."""
    import accelerate
    import transformers

    device = torch.cuda.get_device_name() if GPU else f"CPU ({platform.machine()}, gloo)"
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    )
    lines = [f"`{command}`", "", f"{device}; {versions}. fp32 master weights, bf16 compute, fused AdamW.", ""]
    lines += ["| scenario | tokens a GPU | GPUs | way | ms/step | tokens/s/GPU | x peer | peak GiB | of peer | loss |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    profiles = [
        "",
        f"| GPU time of a step, ms | way | {' | '.join(KINDS)} | other |",
        "|---|---|" + "---|" * (len(KINDS) + 1),
    ]
    peers: dict[tuple[str, int], dict[str, Any]] = {}
    for name, gpus, way, result in rows:
        if way != OURS and "step_s" in result:
            peers[name, gpus] = min(peers.get((name, gpus), result), result, key=lambda r: r["step_s"])
    for name, gpus, way, result in rows:
        scenario = scenarios[name]
        cells = [name, f"{scenario.batch_size} x {scenario.seq_len}", str(gpus), way]
        if "why_not" in result:
            cells += [result["why_not"], "", "", "", "", ""]
        else:
            step_s, peak_bytes, peer = result["step_s"], result["peak_bytes"], peers.get((name, gpus))
            cells += [f"{step_s * 1e3:.0f}", f"{scenario.tokens / step_s:,.0f}"]
            cells += [f"{peer['step_s'] / step_s:.2f}" if peer else "-"]
            cells += [f"{peak_bytes / 2**30:.1f}" if peak_bytes else "-"]
            cells += [f"{peak_bytes / peer['peak_bytes']:.2f}" if peer and peak_bytes else "-", f"{result['loss']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
        if split := result.get("split_ms"):
            times = [f"{split.get(kind, 0):.0f}" for kind in [*KINDS, "other"]]
            profiles.append(f"| {name}, {gpus} GPUs | {way} | {' | '.join(times)} |")
    return "\n".join(lines + (profiles if len(profiles) > 3 else []))


def chart(rows: list[tuple[str, int, str, dict[str, Any]]], scenarios: dict[str, Scenario], path: Path) -> None:
    """Bars of tokens/s/GPU."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no chart")
        return
    groups = list(dict.fromkeys((name, gpus) for name, gpus, _, _ in rows))
    ways = list(dict.fromkeys(way for _, _, way, _ in rows))
    step_s = {(name, gpus, way): result.get("step_s") for name, gpus, way, result in rows}
    figure, axes = pyplot.subplots(figsize=(2 + 3 * len(groups), 4))
    width = 0.8 / len(ways)
    for i, way in enumerate(ways):
        times = [step_s.get((*group, way)) for group in groups]
        heights = [scenarios[name].tokens / t if t else 0 for (name, _), t in zip(groups, times)]
        axes.bar([x + i * width for x in range(len(groups))], heights, width, label=way)
    labels = [f"{name}\n{gpus} GPUs" for name, gpus in groups]
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))], labels, fontsize=7)
    axes.set_ylabel("tokens/s/GPU")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def quoted(word: str) -> str:
    return f'"{word}"' if " " in word else word


# ---- A rank: builds the model one way, trains it, measures


def work(way: str, scenario: Scenario, folder: Path, steps: int) -> None:
    """Run one way on this rank; rank 0 writes folder/result.json."""
    if way == "write":
        return random_model(scenario, "cuda" if GPU else "cpu").save_pretrained(folder / scenario.name)
    if way == TRANSFORMERS_EP:
        model, optimizer, backward, device = build_transformers_ep(folder / scenario.name)
    else:
        model, optimizer, backward, device = build_with_accelerate(scenario, ours=way == OURS)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    vocabulary, shape = scenario.config["vocab_size"], (scenario.batch_size, scenario.seq_len)
    batches = [torch.randint(vocabulary, shape, generator=generator).to(device) for _ in range(4)]

    def train(step: int) -> torch.Tensor:
        batch = batches[step % len(batches)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for step in range(WARMUP_STEPS):
        train(step)
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loss, marks = torch.zeros(()), [mark()]
    for step in range(steps):
        loss = train(WARMUP_STEPS + step)
        marks.append(mark())
    step_s = statistics.median(seconds_between(a, b) for a, b in itertools.pairwise(marks))
    peak_bytes = torch.cuda.max_memory_allocated() if GPU else 0
    measured = torch.tensor([peak_bytes, step_s], dtype=torch.double, device=device)
    loss = loss.detach().double().to(device)
    torch.distributed.all_reduce(measured, op=torch.distributed.ReduceOp.MAX)
    torch.distributed.all_reduce(loss)
    split_ms = profiled(lambda: train(0)) if GPU else {}
    if torch.distributed.get_rank() == 0:
        peak_bytes, step_s = measured.tolist()
        loss = loss.item() / torch.distributed.get_world_size()
        result = {"step_s": step_s, "peak_bytes": peak_bytes, "loss": loss, "split_ms": split_ms}
        (folder / "result.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def profiled(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of this rank's GPU by kind of kernel, over one step."""
    split: dict[str, float] = {}
    for name, ms, _ in kernels_of(step):
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
        split[kind] = split.get(kind, 0.0) + ms
    return split


def mark() -> torch.cuda.Event | float:
    """A moment of the GPU's, or where there is none of the clock's."""
    if not GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # pyright: ignore[reportArgumentType]
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def random_model(scenario: Scenario, device: torch.device | str) -> torch.nn.Module:
    """The scenario's model in fp32, with the same random weights on every rank and in every way."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            scenario.model_config(), dtype=torch.float32, attn_implementation="sdpa"
        )
        if scenario.lora_rank:
            from peft import LoraConfig, get_peft_model

            attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
            model = get_peft_model(model, LoraConfig(r=scenario.lora_rank, target_modules=attention))
    return model


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def build_with_accelerate(scenario: Scenario, ours: bool):
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin)
    model = random_model(scenario, accelerator.device)
    if ours:
        accel_moe.prepare(model, moe_ep_degree=accelerator.num_processes)
    else:
        base = model.get_base_model() if scenario.lora_rank else model
        base.set_experts_implementation("grouped_mm")
    model, optimizer = accelerator.prepare(model, adamw(model))
    return model, optimizer, accelerator.backward, accelerator.device


def build_transformers_ep(checkpoint: Path):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if GPU else "gloo")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        distributed_config=DistributedConfig(ep_size=world, fsdp_size=world, fsdp_mixed_precision=True),
    )
    model.train()
    return model, adamw(model), lambda loss: loss.backward(), device


if __name__ == "__main__":
    main()
