"""consolidate's memory does not grow with the model: synthetic checkpoints of 2 GB and 4 GB, largest tensor 64 MiB.

Slow: writes about 14 GB. `python -m tests.distributed.test_checkpoint_sizes FOLDER` makes the checkpoints to time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from accel_moe import MoEConfig
from accel_moe.checkpoint import saving
from accel_moe.weights.safetensors import HubTensor, header_bytes, shard_names
from tests.ranks import run_ranks

LAYERS = {"2GB": 19, "4GB": 39}  # 120 MB each in fp32, most of it one gate_up_proj of 64 MiB

# Anonymous memory is what the process itself holds; pages of files that it reads or writes are the system's to drop.
MEASURED = """
import os, sys, threading, time
import torch, transformers
from transformers import AutoConfig, Qwen3MoeForCausalLM
import accel_moe.checkpoint.export_verify, accel_moe.checkpoint.export_write
from accel_moe import consolidate
def anonymous_kib():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
imports = peak = anonymous_kib()
running = True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous_kib())
        time.sleep(0.005)
watcher = threading.Thread(target=watch)
watcher.start()
started = time.perf_counter()
code = consolidate.main(sys.argv[1:])
took_s = time.perf_counter() - started
running = False
watcher.join()
print(f"RESULT {code} {(peak - imports) // 1024} {took_s:.2f}")
"""


def config_of(layers: int):
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=16384,
        hidden_size=1024,
        moe_intermediate_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=16,
        num_experts_per_tok=2,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="float32",
    )


def meta_model_of(layers: int):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(layers))


def write_checkpoint(layers: int, folder: str) -> None:
    """Four ranks, every parameter sharded over all of them, through our own save."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (4,))
    generator = torch.Generator().manual_seed(dist.get_rank())
    state = {}
    for name, parameter in meta_model_of(layers).state_dict().items():
        own = torch.empty((parameter.shape[0] // 4, *parameter.shape[1:])).normal_(generator=generator)
        state[name] = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
    model = SimpleNamespace(_accel_moe=SimpleNamespace(config=MoEConfig(), model_type="qwen3_moe"))
    save = saving.begin(Path(folder), [model])
    saving.fill(save, lambda: saving.write_dcp(save, "pytorch_model_fsdp_0", {"model": state}))
    saving.complete(save)


def write_base(layers: int, folder: Path) -> None:
    """A base of the same architecture: headers and holes, for nobody reads its values."""
    from transformers.core_model_loading import revert_weight_conversion

    config_of(layers).save_pretrained(folder)
    model = meta_model_of(layers)
    hub = revert_weight_conversion(model, model.state_dict())
    files = shard_names([(key, tensor.numel() * 4) for key, tensor in hub.items()], 1_250_000_000)
    by_file: dict[str, list[HubTensor]] = {}
    for key, tensor in hub.items():
        by_file.setdefault(files[key], []).append(HubTensor(key, "F32", tuple(tensor.shape), files[key]))
    for file, tensors in by_file.items():
        header, _ = header_bytes(tensors)
        with open(folder / file, "wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(tensor.size_bytes for tensor in tensors))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def make(folder: Path, size: str) -> tuple[Path, Path]:
    checkpoint, base = folder / f"checkpoint-{size}", folder / f"base-{size}"
    run_ranks(write_checkpoint, 4, LAYERS[size], str(checkpoint))
    write_base(LAYERS[size], base)
    return checkpoint, base


def measure(*arguments: str) -> tuple[int, int, float]:
    """(exit code, peak MiB above the imports' own, seconds) of one consolidate in a fresh process."""
    ran = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True)
    result = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    assert result, ran.stdout + ran.stderr
    code, peak_mib, took_s = result[0].split()[1:]
    return int(code), int(peak_mib), float(took_s)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_bounded_by_the_largest_group_whatever_the_size(tmp_path):
    peaks = {}
    for size in LAYERS:
        checkpoint, base = make(tmp_path, size)
        code, peaks[size], _ = measure(str(checkpoint), str(tmp_path / f"out-{size}"), str(base))
        assert code == 0
    # a group of 64 MiB, its converted copy, and 32 MiB of blocks being hashed; 300 is the promise
    assert max(peaks.values()) <= 300, peaks
    assert abs(peaks["4GB"] - peaks["2GB"]) <= 40, peaks  # the same but for the allocator's mood


if __name__ == "__main__":
    for size in LAYERS:
        print(*make(Path(sys.argv[1]), size))
