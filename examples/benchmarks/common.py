"""Shared by the benchmarks: a median time, the kernels of a run, a checkpoint of random weights, and a section of
RESULTS.md that a run replaces."""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """The median of `repeats` runs after three that warm up, each between two CUDA events (on a CPU, by the clock)."""
    for _ in range(3):
        run()
    if not torch.cuda.is_available():
        times = [time.perf_counter()]
        for _ in range(repeats):
            run()
            times.append(time.perf_counter())
        return statistics.median(1e3 * (b - a) for a, b in itertools.pairwise(times))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def kernels_of(run: Callable[[], object]) -> list[tuple[str, float, int]]:
    """What one run launches on this process's GPU: (name, milliseconds in all, launches) of each kernel."""
    return gpu_profile(run)[0]


def gpu_profile(run: Callable[[], object]) -> tuple[list[tuple[str, float, int]], float]:
    """`kernels_of` a run, and the milliseconds in which this process's GPU ran at least one of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    kernels = [
        (e.key, e.self_device_time_total / 1e3, e.count) for e in profiler.key_averages() if e.device_type == cuda
    ]
    spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == cuda)
    busy = until = 0.0
    for start, end in spans:  # microseconds
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return kernels, busy / 1e3


def write_random_checkpoint(config: Any, folder: Path, device: str = "cpu") -> None:
    """A causal model's random weights in the Hub's format and bf16, a file a layer: no more than a few layers are in
    memory, however many the config has."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    layers, one = config.num_hidden_layers, copy.deepcopy(config)
    one.num_hidden_layers = 1
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(one, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1TB")  # for the names that its tensors have there
    of_one = folder / "model.safetensors"
    first = load_file(of_one, device=device)
    of_one.unlink()
    whole = copy.deepcopy(model.config)
    whole.num_hidden_layers = layers
    whole.save_pretrained(folder)
    weight_map: dict[str, str] = {}

    def write(layer: int | None) -> None:
        tensors, generator = {}, torch.Generator(device).manual_seed(layer or 0)
        for name, tensor in first.items():
            if (".layers.0." in name) != (layer is not None):
                continue
            name = name.replace(".layers.0.", f".layers.{layer}.")
            random = torch.empty_like(tensor).normal_(std=0.02, generator=generator) if tensor.ndim > 1 else tensor
            tensors[name] = random.cpu()
        file = f"model-{0 if layer is None else layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, [None, *range(layers)]))
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def replace_section(path: Path, benchmark: str, title: str, section: str) -> None:
    """Put `section` between this benchmark's markers in a Markdown file; at its end, under `title`, the first time."""
    begin, end = f"<!-- {benchmark}:begin -->", f"<!-- {benchmark}:end -->"
    text = path.read_text() if path.exists() else "# Results\n"
    if begin not in text:
        text = f"{text.rstrip()}\n\n## {title} ({benchmark}.py)\n\n{begin}\n{end}\n"
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n{section}\n{end}{after}")
