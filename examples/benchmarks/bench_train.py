"""One training step of the same model, three ways: our EP, accelerate FSDP2 with grouped_mm, transformers' own EP.
A fourth, which --ways names, is transformers' EP with our exchange.

    python examples/benchmarks/bench_train.py --gpus "1 2"                    # the scenarios in scenarios.yaml
    python examples/benchmarks/bench_train.py --only mixtral_8x7b_2_layers --results examples/benchmarks/RESULTS.md
    python examples/benchmarks/bench_train.py --gpus 8 --only qwen3_30b_a3b --eager-only

Each (scenario, number of GPUs, way) runs in processes of its own (train_rank.py): random weights from one seed, bf16
compute, fused AdamW, no clipping, random tokens; fp32 master weights and no activation checkpointing, unless the
scenario says so. Reported:

- the median time of a step from CUDA event to CUDA event, with no synchronisation in between;
- tokens/s/GPU, and their ratio to the fastest peer of the same kind (eager or compiled), and of either;
- the greatest peak memory of a rank over the timed steps, and its ratio to that peer's;
- the loss of the last step, which must be alike for all ways.

Then each way is timed again in the same processes with its decoder layers compiled, as accelerate's
dynamo_use_regional_compilation does it; under activation checkpointing accelerate compiles only our layers. One more
step runs under the profiler: the time of rank 0's GPU by kind of kernel, and the time it was busy. The kinds overlap,
and a collective's time includes the wait for the other ranks.

The script prints the tables. With --results they replace this benchmark's section in that file, with a chart beside it.
On a machine without a GPU it runs on gloo ranks, to try the script out. A way that is not installed, or that runs out
of memory, gets a row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import replace_section
from train_rank import (
    BUSY,
    FSDP2,
    GPU,
    KINDS,
    OUR_EXCHANGE,
    OURS,
    TRANSFORMERS_EP,
    Scenario,
    add_arguments,
    checkpoint_of,
    read_scenarios,
)

HERE = Path(__file__).resolve().parent
CONSOLIDATE_WORKERS = 8
PEERS = FSDP2, TRANSFORMERS_EP


@dataclass(frozen=True)
class Row:
    """The result of one scenario on one number of GPUs, one way."""

    scenario: Scenario
    gpus: int
    way: str
    compiled: bool
    result: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.way}, compiled" if self.compiled else self.way

    @property
    def rivals(self) -> tuple[str, int, bool]:
        """The key that rows must share to be compared with each other."""
        return self.scenario.name, self.gpus, self.compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", default="2", help='numbers of GPUs to run on, such as "1 2" (default: %(default)s)')
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", help="some of the scenarios")
    ways = [OURS, *PEERS, OUR_EXCHANGE]
    parser.add_argument("--ways", nargs="+", choices=ways, default=[OURS, *PEERS], metavar="WAY", help=f"of {ways}")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints that are trained here, or find them")
    parser.add_argument("--results", type=Path, metavar="MARKDOWN", help="file to write the section into")
    add_arguments(parser)
    args = parser.parse_args()
    scenarios = read_scenarios(args.scenarios)
    rows: list[Row] = []
    checkpoints: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for scenario in (scenarios[name] for name in args.only or scenarios):
            for gpus in map(int, args.gpus.split()):
                for way in args.ways:
                    results = run_way(args, way, scenario, gpus, folder)
                    if (checkpoint := results.pop("checkpoint", None)) is not None:
                        checkpoints.append(checkpoint_row(scenario, gpus, checkpoint))
                    rows += [Row(scenario, gpus, way, name == "compiled", r) for name, r in results.items()]
                    print(f"{scenario.name}, {gpus} GPU(s), {way}: {results} {checkpoint or ''}", flush=True)
    section = report(rows, f"python {os.path.relpath(__file__)} {' '.join(map(quoted, sys.argv[1:]))}", checkpoints)
    print(f"\n{section}")
    if args.results:
        replace_section(args.results, "bench_train", "A training step", section)
        chart(rows, args.results.with_name("train.png"))


def run_way(args: argparse.Namespace, way: str, scenario: Scenario, gpus: int, folder: Path) -> dict[str, Any]:
    """Start the ranks of one way. {"eager": …, "compiled": …, "checkpoint": …}, as far as rank 0 came, with
    {"why_not": …} for a measurement that failed."""
    if gpus < scenario.least_gpus:
        return {"eager": {"why_not": f"needs {scenario.least_gpus} GPUs"}}
    transformers_ep = way in (TRANSFORMERS_EP, OUR_EXCHANGE)
    if transformers_ep and (why := no_transformers_ep(gpus, "ep_size" if way in PEERS else "ep_implementation")):
        return {"eager": {"why_not": why}}
    if transformers_ep and scenario.lora_rank:
        return {"eager": {"why_not": "it shards while it loads, before there are adapters"}}
    if transformers_ep and not scenario.reshard_after_forward:
        return {"eager": {"why_not": "its DistributedConfig has no such option"}}
    if way == TRANSFORMERS_EP and scenario.cp > 1:
        return {"eager": {"why_not": "it has no context parallelism"}}
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    rank = [str(HERE / "train_rank.py"), way, scenario.name, str(folder)]
    rank += ["--scenarios", str(args.scenarios), "--steps", str(args.steps)]
    rank += ["--eager-only"] * args.eager_only
    saved = Path(tempfile.mkdtemp(prefix="bench_train_", dir=args.save)) if args.save and way == OURS else None
    if saved is not None:
        rank += ["--save", str(saved)]
    reads = transformers_ep or scenario.from_files or args.save is not None  # the first trains what it loads
    if reads and not checkpoint_of(scenario, folder).exists():
        if subprocess.run([sys.executable, rank[0], "write", *rank[2:]]).returncode:
            return {"eager": {"why_not": "its checkpoint could not be written"}}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    done = subprocess.run([*launch, *rank], capture_output=True, text=True)
    results = json.loads(result.read_text()) if result.exists() else {}
    if done.returncode:
        print(done.stdout[-3000:] + done.stderr[-6000:], file=sys.stderr)
        out_of_memory = "out of memory" in done.stderr.lower()
        why = "out of memory" if out_of_memory else f"failed with exit code {done.returncode}"
        missing = ["eager", *["compiled"] * (not args.eager_only)]
        results |= {name: {"why_not": why} for name in missing if name not in results}
    if saved is not None:
        if "checkpoint" in results:
            results["checkpoint"] |= consolidate(saved, checkpoint_of(scenario, folder))
        shutil.rmtree(saved)
    return results


def no_transformers_ep(gpus: int, field: str) -> str | None:
    """Why transformers' expert parallelism cannot run with this field of its DistributedConfig, or None."""
    if gpus == 1:
        return "needs 2 GPUs"
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return "not in this transformers"
    return None if field in DistributedConfig.__dataclass_fields__ else "not in this transformers"


def consolidate(folder: Path, base: Path) -> dict[str, Any]:
    """Time the export of the checkpoint in `folder`."""
    from accel_moe.weights.safetensors import read_hub_tensors

    command = [sys.executable, "-m", "accel_moe.consolidate", "--workers", str(CONSOLIDATE_WORKERS)]
    command += [str(folder / "state"), str(folder / "hub"), str(base)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-3000:] + done.stderr[-3000:], file=sys.stderr)
        return {"why_not": f"failed with exit code {done.returncode}"}
    seconds = time.perf_counter() - started
    written = sum(file.stat().st_size for file in (folder / "hub").rglob("*.safetensors"))
    same_names = read_hub_tensors(folder / "hub").keys() == read_hub_tensors(base).keys()
    return {"consolidate_s": seconds, "written_bytes": written, "same_names": same_names}


def checkpoint_row(scenario: Scenario, gpus: int, result: dict[str, Any]) -> str:
    stored = result["stored_bytes"] / 2**30
    cells = [scenario.name, str(gpus), f"{stored:.1f}", f"{result['save_s']:.1f}", f"{result['load_s']:.1f}"]
    if "why_not" in result:
        cells += ["", result["why_not"], ""]
    else:
        cells += [f"{result['written_bytes'] / 2**30:.1f}", f"{result['consolidate_s']:.1f}"]
        cells += ["yes" if result["same_names"] else "NO"]
    return f"| {' | '.join(cells)} |"


def report(rows: list[Row], command: str, checkpoints: list[str]) -> str:
    """The Markdown section: how it was measured, one row per way with its ratios to the fastest peer, the profiles."""
    import accelerate
    import transformers

    device = torch.cuda.get_device_name() if GPU else f"CPU ({platform.machine()}, gloo)"
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    )
    lines = [f"`{command}`", "", f"{device}; {versions}. bf16 compute, fused AdamW.", ""]
    lines += [
        table_head(
            "scenario | tokens a GPU | GPUs | way | ms/step | tokens/s/GPU | x peer | x best | peak GiB | of peer |"
            " loss"
        )
    ]
    profiles = [
        table_head(f"ms of a step | way | forward | backward | optimizer | {BUSY} | {' | '.join(KINDS)} | other")
    ]
    peers: dict[tuple[str, int, bool], dict[str, Any]] = {}
    for row in rows:
        if row.way in PEERS and "step_s" in row.result:
            best = peers.get(row.rivals, row.result)
            peers[row.rivals] = min(best, row.result, key=lambda r: r["step_s"])
    for row in rows:
        scenario, result = row.scenario, row.result
        cells = [scenario.name, tokens_a_gpu(scenario), str(row.gpus), row.name]
        if "why_not" in result:
            cells += [result["why_not"], "", "", "", "", "", ""]
        else:
            step_s, peak_bytes, peer = result["step_s"], result["peak_bytes"], peers.get(row.rivals)
            cells += [f"{step_s * 1e3:.0f}", f"{scenario.tokens / step_s:,.0f}"]
            either = [found for (*run, _), found in peers.items() if tuple(run) == row.rivals[:2]]
            best_s = min((found["step_s"] for found in either), default=None)
            cells += [f"{peer['step_s'] / step_s:.2f}" if peer else "-", f"{best_s / step_s:.2f}" if best_s else "-"]
            cells += [f"{peak_bytes / 2**30:.1f}" if peak_bytes else "-"]
            cells += [f"{peak_bytes / peer['peak_bytes']:.2f}" if peer and peak_bytes else "-", f"{result['loss']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
        if split := result.get("split_ms"):
            times = [1e3 * s for s in result["phases_s"]] + [split.get(kind, 0) for kind in [BUSY, *KINDS, "other"]]
            profiles.append(
                f"| {scenario.name}, {row.gpus} GPUs | {row.name} | {' | '.join(f'{t:.0f}' for t in times)} |"
            )
    if len(profiles) > 1:
        lines += ["", *profiles]
    if checkpoints:
        head = "scenario | GPUs | GiB stored | save s | load s (cached) | GiB written | consolidate s | base's names"
        lines += ["", table_head(head), *checkpoints]
    return "\n".join(lines)


def tokens_a_gpu(scenario: Scenario) -> str:
    whole = f"{scenario.batch_size} x {scenario.seq_len}"
    return whole if scenario.cp == 1 else f"{whole} / cp {scenario.cp}"


def table_head(cells: str) -> str:
    return f"| {cells} |\n|{'---|' * len(cells.split(' | '))}"


def chart(rows: list[Row], path: Path) -> None:
    """Bars of tokens/s/GPU."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no chart")
        return
    groups = list(dict.fromkeys((row.scenario.name, row.gpus) for row in rows))
    ways, bars = list(dict.fromkeys(row.way for row in rows)), list(dict.fromkeys(row.name for row in rows))
    rates = {
        (row.scenario.name, row.gpus, row.name): row.scenario.tokens / row.result["step_s"]
        for row in rows
        if "step_s" in row.result
    }
    figure, axes = pyplot.subplots(figsize=(max(8, 2 + 3 * len(groups)), 4.5), layout="constrained")
    width = 0.8 / len(bars)
    for i, bar in enumerate(bars):
        of = next(row for row in rows if row.name == bar)
        look = {"color": f"C{ways.index(of.way)}", "alpha": 1.0 if of.compiled else 0.55}
        places = [x + i * width for x in range(len(groups))]
        axes.bar(places, [rates.get((*group, bar), 0) for group in groups], width, label=bar, **look)
        for place, group in zip(places, groups):
            if (*group, bar) not in rates:
                axes.text(place, 0, " no run", rotation=90, ha="center", va="bottom", fontsize=7, color="0.4")
    labels = [f"{name.replace('_layers_', '_layers' + chr(10))}, {gpus} GPUs" for name, gpus in groups]
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))], labels, fontsize=8)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("tokens/s/GPU")
    axes.set_title(f"a training step, {torch.cuda.get_device_name() if GPU else 'CPU'}")
    figure.legend(loc="outside lower center", ncols=min(3, len(bars)))  # beside the bars, not on them
    figure.savefig(path, dpi=120)


def quoted(word: str) -> str:
    return f'"{word}"' if " " in word else word


if __name__ == "__main__":
    main()
