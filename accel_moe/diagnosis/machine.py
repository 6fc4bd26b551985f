"""The machine: versions, GPUs and their links, kernels, folders. Under a minute."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from accel_moe import check, supported
from accel_moe.diagnosis import disk, kernels, shrink
from accel_moe.diagnosis.launch import last_line, run_ranks
from accel_moe.diagnosis.report import Line, failed, judged, passed, skipped

GATHERED_BYTES, REPEATS, TIMEOUT_S = 64 << 20, 5, 60
"""Of the all-gather: bytes that each GPU sends, and how many times after one to warm up."""
SLOW_GB_PER_S = 4.0
"""Below this the exchange of tokens costs more than it saves. PCIe gives 10 to 50, NVLink 100 and more."""


def lines(config: Any | None, output: Path, checkpoint_bytes: int) -> Iterator[Line]:
    """Every line of the machine.

    Args:
        config: of the user's model; None takes a small Qwen3-MoE for the kernels.
        output: the folder of checkpoints.
    """
    yield from version_lines()
    yield from gpu_lines()
    yield from kernel_lines(config)
    yield from disk.lines(output, checkpoint_bytes)


def version_lines() -> Iterator[Line]:
    """The versions and the patched functions, as `python -m accel_moe.families --check` judges them."""
    off, found = [], []
    for finding in check.findings(families=()):
        found.append(f"{finding.subject} {finding.found}")
        if finding.is_off:
            off.append(f"{finding.subject} {finding.found} ({finding.verdict}; expected {finding.expected})")
    names = [row.name for row in supported.VERSIONS]
    right = f"{', '.join(found[: len(names)])}; {len(found) - len(names)} patched functions as expected"
    mend = f"Install {supported.words('torch', 'accelerate', 'transformers')}, or update accel_moe."
    yield judged("versions", "; ".join(off) or None, right, mend)


def gpu_lines() -> Iterator[Line]:
    """The GPUs, whether each can read the others' memory, and the all-gather's bandwidth."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        yield skipped("GPUs", "none found: ranks talk over gloo, experts run grouped_mm on the CPU")
        return
    names = [torch.cuda.get_device_name(i) for i in range(count)]
    yield passed("GPUs", ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)))
    if count == 1:
        yield skipped("links", "one GPU has nobody to talk to")
        return
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    apart = [f"{i}-{j}" for i, j in pairs if i < j and not torch.cuda.can_device_access_peer(i, j)]
    # not a fault: dispatchers that do not share memory work
    yield passed("peer access", f"not between {', '.join(apart)}" if apart else f"all {len(pairs)} pairs")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        why = run_ranks(measure_link, GATHERED_BYTES, folder, ranks=count, device="cuda", timeout_s=TIMEOUT_S)
        if why is not None:
            mend = "NCCL_DEBUG=INFO tells more; NCCL_P2P_DISABLE=1 avoids broken peer access."
            yield failed("NCCL", last_line(why), mend, detail=why)
            return
        found = json.loads((folder / "link.json").read_text())
    yield passed("symmetric memory", "can be mapped" if found["symmetric"] else "cannot: use another moe_dispatcher")
    speed = f"all-gather {found['gb_per_s']:.1f} GB/s into each GPU"
    slow = speed if found["gb_per_s"] < SLOW_GB_PER_S else None
    yield judged("NCCL", slow, speed, "See `nvidia-smi topo -m`: are GPUs linked, and is NCCL_P2P_DISABLE unset?")


def measure_link(own_bytes: int, folder: Path) -> None:
    """Rank 0 writes link.json: bandwidth of an all-gather, and whether memory can be shared. A collective."""
    import os

    import torch.distributed as dist

    from accel_moe.dispatch.symmetric import can_map_peers

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    own = torch.zeros(own_bytes, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    gathered = own.new_empty(dist.get_world_size() * own_bytes)
    dist.all_gather_into_tensor(gathered, own)
    _wait_for_gpu()
    began = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_gather_into_tensor(gathered, own)
    _wait_for_gpu()
    took_s = time.perf_counter() - began
    can: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(can, can_map_peers(dist.group.WORLD))
    if dist.get_rank() == 0:
        received = (len(can) - 1) * own_bytes * REPEATS
        found = {"gb_per_s": received / took_s / 1e9, "symmetric": all(can)}
        (folder / "link.json").write_text(json.dumps(found))


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernel_lines(config: Any | None) -> Iterator[Line]:
    """The kernels of this model's experts; of a small Qwen3-MoE if there is no model."""
    if config is None:
        from transformers import Qwen3MoeConfig

        config = Qwen3MoeConfig()
    own_sizes = torch.cuda.is_available()
    try:
        chosen = config if own_sizes else shrink.shrunk(config)
    except ValueError as error:
        yield skipped(kernels.SUBJECT, str(error))
        return
    yield from kernels.lines(chosen, own_sizes)
