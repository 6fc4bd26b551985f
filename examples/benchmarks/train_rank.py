"""What bench_train.py starts on each rank: one scenario's model, built one way, trained and measured.

    python -m torch.distributed.run ... train_rank.py WAY SCENARIO FOLDER [--scenarios YAML --steps N --eager-only]

Weights are random from one seed, tokens are random. A scenario with `from_files` is too large for one GPU: its weights
are written once, layer by layer, in the Hub's format, and every way reads them into its shards. Rank 0 writes the
measured values to FOLDER/result.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from common import gpu_profile, write_random_checkpoint

WARMUP_STEPS = 4
OURS, FSDP2, TRANSFORMERS_EP = "accel_moe", "FSDP2 + grouped_mm", "transformers EP"
OUR_EXCHANGE = "transformers EP, accel_moe exchange"
GPU = torch.cuda.is_available()
BUSY = "busy"
KINDS = {
    "fused by Inductor": ("triton_poi_", "triton_red_", "triton_per_"),
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
    lora_experts: bool = False
    """LoRA on the experts, too."""
    least_gpus: int = 1
    """With fewer it is left out."""
    ep_degree: int = 0
    """Of ours; 0 is every GPU."""
    from_files: bool = False
    """Weights come from a checkpoint in bf16; no rank makes the whole model."""
    activation_checkpointing: bool = False
    reshard_after_forward: bool = True
    """False keeps what FSDP gathered in forward until backward has used it."""
    bf16_weights: bool = False
    """Weights and AdamW's moments in bf16, with no fp32 master copy."""
    bf16_base: bool = False
    """The base in bf16, which PEFT's users freeze; their adapters stay in fp32."""
    quantize: str = "none"
    """moe_quantize_experts, of ours; the rest of the base is in bf16."""
    cp: int = 1
    """How many neighbouring GPUs share each sequence (context parallelism)."""

    def model_config(self):
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **self.config)

    @property
    def dtype(self) -> torch.dtype:
        low = self.bf16_weights or self.bf16_base or self.quantize != "none"
        return torch.bfloat16 if low else torch.float32

    @property
    def tokens(self) -> int:
        """Of a GPU and step."""
        return self.batch_size * self.seq_len // self.cp


def read_scenarios(path: Path) -> dict[str, Scenario]:
    return {name: Scenario(name, **fields) for name, fields in yaml.safe_load(path.read_text()).items()}


def checkpoint_of(scenario: Scenario, folder: Path) -> Path:
    """The folder of the weights, if the scenario reads files; scenarios of one model share it."""
    if not scenario.from_files:
        return folder / scenario.name
    return folder / f"{scenario.model_type}_{scenario.config['num_hidden_layers']}_layers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that bench_train.py passes on to its ranks."""
    here = Path(__file__).resolve().parent
    parser.add_argument("--scenarios", type=Path, default=here / "scenarios.yaml", metavar="YAML")
    parser.add_argument("--steps", type=int, default=12, help="timed steps (default: %(default)s)")
    parser.add_argument(
        "--eager-only",
        action="store_true",
        help="do not time every way again with its decoder layers compiled",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FOLDER",
        help="at the end, of our way, time save_state into a folder in this one, load_state and consolidate",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way")
    parser.add_argument("scenario")
    parser.add_argument("folder", type=Path)
    add_arguments(parser)
    args = parser.parse_args()
    scenario = read_scenarios(args.scenarios)[args.scenario]
    if args.way == "write":
        write_checkpoint(scenario, checkpoint_of(scenario, args.folder))
    else:
        work(args.way, scenario, args)


def work(way: str, scenario: Scenario, args: argparse.Namespace) -> None:
    """Run one way on this rank; rank 0 writes {"eager": …, "compiled": …, "checkpoint": …}, each when it is known."""
    checkpoint = checkpoint_of(scenario, args.folder)
    if way in (TRANSFORMERS_EP, OUR_EXCHANGE):
        trained = build_transformers_ep(scenario, checkpoint, ours=way == OUR_EXCHANGE)
    else:
        trained = build_with_accelerate(scenario, checkpoint, ours=way == OURS)
    results: dict[str, Any] = {}

    def note(name: str, result: Any) -> None:
        results[name] = result
        if torch.distributed.get_rank() == 0:
            (args.folder / "result.json").write_text(json.dumps(results))

    loading = {"peak_bytes_of_loading": torch.cuda.max_memory_allocated() if GPU else 0}
    note("eager", measured(trained, scenario, args.steps) | loading)
    if not args.eager_only:
        compile_layers(trained.model)
        note("compiled", measured(trained, scenario, args.steps))
    if args.save is not None and way == OURS:
        note("checkpoint", save_and_load(trained, args.save))
    torch.distributed.destroy_process_group()


# ---- Models


@dataclass
class Trained:
    """The parts of a training loop."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    backward: Callable[[torch.Tensor], Any]
    device: torch.device
    accelerator: Any = None


def build_with_accelerate(scenario: Scenario, checkpoint: Path, ours: bool) -> Trained:
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        activation_checkpointing=scenario.activation_checkpointing,
        reshard_after_forward=scenario.reshard_after_forward,
        state_dict_type="SHARDED_STATE_DICT",
    )
    mesh = ParallelismConfig(cp_size=scenario.cp, dp_shard_size=int(os.environ["WORLD_SIZE"]) // scenario.cp)
    accelerator = Accelerator(
        mixed_precision="no" if scenario.bf16_weights else "bf16",
        fsdp_plugin=plugin,
        parallelism_config=mesh if scenario.cp > 1 else None,
    )
    if scenario.from_files:
        model = accel_moe.from_pretrained(checkpoint, dtype=scenario.dtype, attn_implementation="sdpa")
        model = with_adapter(scenario, model).train()
    else:
        model = random_model(scenario, accelerator.device)
    if ours:
        degree = scenario.ep_degree or accelerator.num_processes
        accel_moe.prepare(model, moe_ep_degree=degree, moe_quantize_experts=scenario.quantize)
    else:
        base = model.get_base_model() if scenario.lora_rank else model
        base.set_experts_implementation("grouped_mm")
    model, optimizer = accelerator.prepare(model, adamw(model))
    return Trained(model, optimizer, accelerator.backward, accelerator.device, accelerator)


def build_transformers_ep(scenario: Scenario, checkpoint: Path, ours: bool) -> Trained:
    """transformers' own expert parallelism, with its exchange or with ours."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import accel_moe  # noqa: F401  # registers ep_implementation="accel_moe"

    exchange = {"ep_implementation": "accel_moe"} if ours else {}  # older versions have no such field
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if GPU else "gloo")
    mixed = not scenario.bf16_weights
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=scenario.dtype,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        distributed_config=DistributedConfig(ep_size=world, fsdp_size=world, fsdp_mixed_precision=mixed, **exchange),
    )
    model.train()
    if scenario.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Trained(model, adamw(model), lambda loss: loss.backward(), device)


def random_model(scenario: Scenario, device: torch.device | str) -> torch.nn.Module:
    """The scenario's model, with the same random weights on every rank and in every way."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            scenario.model_config(), dtype=scenario.dtype, attn_implementation="sdpa"
        )
        return with_adapter(scenario, model)


def with_adapter(scenario: Scenario, model: torch.nn.Module) -> torch.nn.Module:
    if not scenario.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if scenario.lora_experts else None
    return get_peft_model(model, LoraConfig(r=scenario.lora_rank, target_modules=attention, target_parameters=experts))


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def write_checkpoint(scenario: Scenario, final: Path) -> None:
    """Write the scenario's random model in the Hub's format, from which transformers' EP loads it."""
    device, folder = "cuda" if GPU else "cpu", final.with_name(f"{final.name}.part")
    if scenario.from_files:
        write_random_checkpoint(scenario.model_config(), folder, device)
    else:
        random_model(scenario, device).save_pretrained(folder)
    folder.rename(final)


def compile_layers(model: torch.nn.Module) -> None:
    """Apply accelerate's regional compilation to a model that it has wrapped already."""
    import accelerate.accelerator
    import torch._dynamo

    torch._dynamo.config.capture_scalar_outputs = True
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    accelerate.accelerator.compile_regions_fsdp2(model, backend="inductor")


# ---- Measuring


def measured(trained: Trained, scenario: Scenario, steps: int) -> dict[str, Any]:
    """One way's step, as all ranks see it: the slowest rank's times, the greatest peak, the mean loss."""
    device, world = trained.device, torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(torch.distributed.get_rank() // scenario.cp)
    vocabulary, shape = scenario.config["vocab_size"], (scenario.batch_size, scenario.seq_len)
    batches = [torch.randint(vocabulary, shape, generator=generator).to(device) for _ in range(4)]

    def train(step: int) -> tuple[torch.Tensor, list[Any]]:
        batch = batches[step % len(batches)]
        with sequences(trained, scenario, batch) as part:
            loss = trained.model(**part, use_cache=False).loss
            marks = [mark()]
            trained.backward(loss)
            marks.append(mark())
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        return loss, [*marks, mark()]

    for step in range(WARMUP_STEPS):
        train(step)
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loss, marks = torch.zeros(()), [mark()]
    for step in range(steps):
        loss, more = train(WARMUP_STEPS + step)
        marks += more
    seconds = [seconds_between(a, b) for a, b in itertools.pairwise(marks)]
    phases = [statistics.median(seconds[phase::3]) for phase in range(3)]
    whole = statistics.median(sum(seconds[first : first + 3]) for first in range(0, len(seconds), 3))
    peak_bytes = torch.cuda.max_memory_allocated() if GPU else 0
    most = torch.tensor([peak_bytes, whole, *phases], dtype=torch.double, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    loss = loss.detach().double().to(device)
    torch.distributed.all_reduce(loss)
    peak_bytes, whole, *phases = most.tolist()
    split_ms = profiled(lambda: train(0)) if GPU else {}
    return {
        "step_s": whole,
        "phases_s": phases,
        "peak_bytes": peak_bytes,
        "loss": loss.item() / world,
        "split_ms": split_ms,
    }


def sequences(trained: Trained, scenario: Scenario, batch: torch.Tensor) -> AbstractContextManager[dict[str, Any]]:
    """The model's arguments for a batch: all of it, or this rank's part of its sequences."""
    import accel_moe

    whole = {"input_ids": batch, "labels": batch}
    return nullcontext(whole) if scenario.cp == 1 else accel_moe.context_parallel(trained.accelerator, whole)


def profiled(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of this rank's GPU over one step: by kind of kernel, and busy with any."""
    kernels, busy_ms = gpu_profile(step)
    split = {BUSY: busy_ms}
    for name, ms, _ in kernels:
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
        split[kind] = split.get(kind, 0.0) + ms
    return split


def mark() -> torch.cuda.Event | float:
    """The present moment: a recorded CUDA event, or the clock without a GPU."""
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


def save_and_load(trained: Trained, folder: Path) -> dict[str, float]:
    """save_state and load_state of the whole job, by the clock between barriers; for consolidate it stays."""
    state = folder / "state"

    def timed(act: Callable[[str], Any]) -> float:
        torch.distributed.barrier()
        started = time.perf_counter()
        act(str(state))
        if GPU:
            torch.cuda.synchronize()
        torch.distributed.barrier()
        return time.perf_counter() - started

    save_s, load_s = timed(trained.accelerator.save_state), timed(trained.accelerator.load_state)
    stored = sum(file.stat().st_size for file in state.rglob("*") if file.is_file())
    return {"save_s": save_s, "load_s": load_s, "stored_bytes": stored}


if __name__ == "__main__":
    main()
