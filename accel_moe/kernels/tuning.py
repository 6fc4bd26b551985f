"""Which tile sizes each kernel runs with: a table of measured ones, and a rule for shapes that nobody has
measured.

The table is data, `tuned.json`; examples/benchmarks/bench_experts.py --tune measures. Nothing here changes a
result beyond the order in which fp32 partial sums are rounded.
"""

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of one GEMM kernel.

    block_p cuts rows (the summed dimension in weight_grad); block_n the output's columns (per half, gate or
    up, in up_projection); block_k the summed dimension (the other output dimension in weight_grad); group
    counts row tiles.
    """

    block_p: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    tma: bool = True

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """What a configuration is chosen by: one grouped GEMM of one layer."""

    kernel: str  # up | down | down_backward | up_backward | weight_grad
    rows: int  # P
    num_experts: int
    hidden: int
    intermediate: int
    dtype: torch.dtype

    @property
    def rows_per_expert(self) -> int:
        """Rounded up to a power of two: shapes that share it share a configuration."""
        mean = max(1, self.rows // max(1, self.num_experts))
        return 1 << (mean - 1).bit_length()


def pick(problem: Problem, device: torch.device) -> Config:
    """The configuration to launch `problem` with on `device`."""
    if _INTERPRETED:
        # Small tiles: tests reach every edge of a tile with tensors that the interpreter can afford.
        return Config(block_p=16, block_n=16, block_k=16, num_warps=1, num_stages=1, group=2, tma=False)
    tuned = _table().get(_key(problem, torch.cuda.get_device_capability(device)))
    return tuned or _rule(problem, torch.cuda.get_device_capability(device))


def _key(problem: Problem, capability: tuple[int, int]) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    shape = f"H{problem.hidden} I{problem.intermediate} rows{problem.rows_per_expert}"
    return f"sm{capability[0]}{capability[1]} {dtype} {problem.kernel} {shape}"


@functools.cache
def _table() -> dict[str, Config]:
    path = Path(__file__).with_name("tuned.json")
    return {key: Config(**value) for key, value in json.loads(path.read_text()).items()}


def _rule(problem: Problem, capability: tuple[int, int]) -> Config:
    """A safe choice: fits the shared memory of every chip since sm80 and wastes few rows when experts have
    few.
    """
    few_rows = 16 if problem.rows_per_expert <= 16 else 32 if problem.rows_per_expert <= 32 else 64
    if problem.dtype == torch.float32:
        if problem.kernel == "weight_grad":
            return Config(block_p=32, block_n=64, block_k=64, num_warps=4, num_stages=2, tma=False)
        return Config(block_p=few_rows, block_n=32, block_k=32, num_warps=4, num_stages=2, tma=False)
    hopper = capability[0] >= 9
    if problem.kernel == "weight_grad":
        if problem.rows_per_expert >= 256 and hopper:
            return Config(block_p=64, block_n=256, block_k=128, num_warps=8, num_stages=3)
        return Config(block_p=few_rows, block_n=128, block_k=128, num_warps=8 if hopper else 4, num_stages=3)
    if problem.rows_per_expert > 128:
        wide = hopper and problem.kernel in ("down", "up_backward")
        return Config(
            block_p=128,
            block_n=256 if wide else 128 if hopper or problem.kernel != "up" else 64,
            block_k=64 if hopper else 32,
            num_warps=8,
            num_stages=3,
        )
    if problem.kernel == "up":
        return Config(block_p=few_rows, block_n=64, block_k=64, num_warps=4, num_stages=3)
    return Config(block_p=few_rows, block_n=128, block_k=64, num_warps=4, num_stages=3)
