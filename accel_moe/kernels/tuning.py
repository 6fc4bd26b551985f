"""Which tile sizes each kernel runs with.

`choose` answers from, in this order: the table of measured shapes shipped as data (tuned.json), the cache of shapes
measured on this machine, a measurement now, a rule. A measurement times a handful of candidates on the very call that
needs one (a kernel only writes its outputs, so running it again is harmless and takes no memory), some ten seconds
for a layer's six GEMMs, once. Ranks share the cache: the first to need a shape locks it and measures, the others wait
for the result, never longer than WAIT_S, since a rank that waits may hold up a collective that the measuring one is
queued behind. Measuring is left out under CUDA graph capture, for shapes of few rows, and with SCATTERMOE_AUTOTUNE=0.
SCATTERMOE_CACHE names the cache's folder. Where roads.py lets them run, Gluon's kernels for Hopper are candidates,
too; shapes measured so have keys of their own.

A configuration changes no result beyond the order in which fp32 partial sums are added.
"""

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
import triton

logger = logging.getLogger(__name__)

WAIT_S = 20.0
MEASURE_S = 8.0  # for one GEMM's candidates, compiling included; the one under way is finished
MIN_ROWS = 16  # per expert: fewer is generation, where the number of tokens changes from call to call
MEANING = 2  # of an entry on disk: one more when a field of Config comes to mean something else
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_Result = TypeVar("_Result")
_TOO_LARGE = (triton.runtime.errors.OutOfResources, triton.CompilationError)


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of one GEMM.

    block_p cuts rows (the summed dimension of a weight gradient); block_n the output's columns (in `up` those of each
    half, gate and up); block_k the summed dimension (a weight gradient's other output dimension). group is how many
    row tiles are walked before the next column tile. A constant of the kernels.
    """

    block_p: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    gather: bool = True  # rows of tokens are gathered by the GEMM's own loads (gemm.py: `up` alone), or copied once
    chunks: int = 2  # `down_backward`: column parts of the epilogue, one after the other (1, 2 or 4)
    gluon: bool = False  # a kernel of hopper*.py, not gemm.py's

    @property
    def plain(self) -> "Config":
        """For gemm.py's kernel, where Gluon's was meant and cannot run.

        All of these run with 8 warps there: 4 are one of down_backward's two finishers. Only down_backward has chunks.
        """
        return replace(self, gluon=False, num_warps=8, num_stages=3, chunks=4) if self.gluon else self


class Problem(NamedTuple):
    """What a configuration is chosen by: one grouped GEMM of one layer."""

    kernel: str  # up | up_plain (not gated) | down | down_backward | down_weight_grad | up_weight_grad | up_backward
    rows: int  # P
    num_experts: int
    hidden: int
    intermediate: int
    dtype: torch.dtype
    capability: tuple[int, int]
    gluon: bool = False  # Gluon's kernels may be chosen, too

    @property
    def rows_per_expert(self) -> int:
        """The mean, rounded to a power of two, at most 4096: shapes that share it share a configuration."""
        mean = max(1.0, self.rows / max(1, self.num_experts))
        return min(4096, 1 << round(math.log2(mean)))

    @property
    def key(self) -> str:
        major, minor = self.capability
        dtype = str(self.dtype).removeprefix("torch.")
        key = f"sm{major}{minor} {dtype} {self.kernel} H{self.hidden} I{self.intermediate} rows{self.rows_per_expert}"
        return f"{key} gluon" if self.gluon else key


def choose(problem: Problem, launch: Callable[[Config], _Result]) -> Config:
    """The configuration to launch `problem` with; may call launch, which runs the kernel, to find out."""
    if known := _known(problem):
        return known
    if not _worth_measuring(problem):
        return rule(problem)
    config = _measure_or_wait(problem, launch)
    _measured[_key(problem)] = config
    return config


def expected(problem: Problem) -> Config:
    """The configuration that `choose` gives, unless it measures first."""
    return _known(problem) or rule(problem)


def _known(problem: Problem) -> Config | None:
    if _INTERPRETED:
        # Small tiles: tests reach every edge of a tile with tensors that the interpreter can afford.
        return Config(block_p=16, block_n=16, block_k=16, num_warps=1, num_stages=1, group=2)
    key = _key(problem)
    return _shipped().get(key) or _measured.get(key)


@functools.lru_cache(1024)  # asked for at every launch of a GEMM
def _key(problem: Problem) -> str:
    return problem.key


# ---- The table and the rule


@functools.cache
def _shipped() -> dict[str, Config]:
    path = Path(__file__).with_name("tuned.json")
    return {key: Config(**value) for key, value in json.loads(path.read_text()).items()}


@functools.lru_cache(1024)
def rule(problem: Problem) -> Config:
    """A safe choice: fits the shared memory of every chip since sm80, and wastes few rows when experts have few."""
    few, hopper = problem.rows_per_expert <= 128, problem.capability[0] >= 9
    height = max(16, min(64, problem.rows_per_expert))
    weight_grad = problem.kernel.endswith("_weight_grad")
    if problem.dtype == torch.float32:
        if weight_grad:
            return Config(block_p=32, block_n=64, block_k=64, num_warps=4, num_stages=2)
        return Config(block_p=height, block_n=32, block_k=32, num_warps=4, num_stages=2)
    if weight_grad:
        if hopper and not few:
            return Config(block_p=64, block_n=256, block_k=128, num_warps=8, num_stages=3)
        # Few rows: the time goes into writing the gradient, so several programs must share a multiprocessor.
        return Config(block_p=min(height, 32), block_n=128, block_k=128, num_warps=4, num_stages=2 if few else 3)
    if few:
        width = 64 if problem.kernel == "up" else 128
        return Config(block_p=height, block_n=width, block_k=64, num_warps=4, num_stages=3)
    if not hopper:
        width = 64 if problem.kernel == "up" else 128
        return Config(block_p=128, block_n=width, block_k=32, num_warps=8, num_stages=3, chunks=2)
    if problem.kernel == "up":
        return Config(block_p=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
    if problem.kernel == "down_backward":
        return Config(block_p=128, block_n=256, block_k=64, num_warps=8, num_stages=4, chunks=4)
    if problem.kernel == "down" and problem.intermediate <= 1024:
        # A short sum: two small programs on a multiprocessor hide each other's first loads and last stores.
        return Config(block_p=128, block_n=128, block_k=64, num_warps=4, num_stages=3)
    return Config(block_p=128, block_n=256, block_k=64, num_warps=8, num_stages=3)


def candidates(problem: Problem) -> list[Config]:
    """What to measure: the rule's choice first, then what has won on some shape."""
    first = rule(problem)
    others = [replace(first, group=1), replace(first, group=16)]
    if problem.kernel == "up_plain":
        others.append(replace(first, gather=False))
    if problem.capability[0] >= 9 and problem.rows_per_expert > 128 and problem.dtype != torch.float32:
        wide, tall = Config(128, 256, 64, 8, 3), Config(256, 128, 64, 8, 4)
        if problem.kernel == "up":
            others += [
                replace(first, num_stages=4),
                replace(first, gather=False),
                replace(first, gather=False, group=16),
            ]
        elif problem.kernel in ("up_plain", "down", "up_backward"):
            others += [wide, tall, replace(wide, num_stages=4), Config(128, 128, 64, 4, 3)]
        elif problem.kernel == "down_backward":
            others += [replace(first, num_stages=3), Config(128, 128, 64, 8, 4, chunks=4)]
        else:
            others += [Config(32, 256, 128, 8, 6), Config(64, 128, 256, 8, 4)]
    elif problem.dtype != torch.float32 and problem.kernel.endswith("_weight_grad"):
        others = [replace(first, num_warps=8), Config(32, 128, 64, 4, 2)]
        if problem.capability[0] >= 9:
            others += [Config(64, 128, 128, 4, 3), Config(64, 256, 128, 8, 3), Config(32, 256, 128, 8, 3)]
    elif problem.dtype != torch.float32:
        others += [replace(first, num_stages=4), replace(first, block_n=first.block_n * 2)]
    if _gathers(problem):  # gemm.py's would need a copy, whose time is not measured with theirs
        return _on_hopper(problem)
    return list(dict.fromkeys([first, *_on_hopper(problem), *others]))


def _gathers(problem: Problem) -> bool:
    """Whether the backward's GEMMs gather rows by their loads, with Gluon's kernels. The copy that they save grows with
    H, what their slower loads cost with H * I: at I of 512 and 768 it pays, at 1024 and more it does not."""
    backward = problem.kernel in ("down_backward", "down_weight_grad", "up_weight_grad")
    return problem.gluon and backward and problem.rows_per_expert > 128 and problem.intermediate <= 768


def _on_hopper(problem: Problem) -> list[Config]:
    """Those of Gluon's kernels, with what has won on some shape first."""
    if not problem.gluon or problem.rows_per_expert <= 128:
        return []
    wide, tall = Config(128, 256, 64, 8, 4, gluon=True), Config(256, 128, 64, 8, 4, gluon=True)
    if problem.kernel in ("up", "up_plain"):
        width = 128 if problem.kernel == "up" else 256
        return [replace(wide, block_n=width), replace(wide, block_n=width, gather=False)]
    if problem.kernel in ("down", "up_backward"):
        return [wide, replace(wide, group=1), tall]
    if problem.kernel == "down_backward":  # two finishers, of 4 warps each
        shared = replace(wide, num_warps=4, gather=_gathers(problem))
        return [shared, replace(shared, group=16), replace(shared, group=1)]
    if _gathers(problem):
        return [Config(64, 256, 128, 8, 4, gluon=True), Config(64, 128, 256, 8, 4, gluon=True)]
    short = Config(32, 256, 128, 8, 8, gather=False, gluon=True)
    return [short, replace(short, block_n=128, block_k=256), replace(short, block_p=64, num_stages=4)]


def beside_collectives() -> bool:
    """Whether this process has others beside it, whose collectives hold multiprocessors while a GEMM runs."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# ---- Measuring, and sharing what was measured

_measured: dict[str, Config] = {}


def _worth_measuring(problem: Problem) -> bool:
    if os.environ.get("SCATTERMOE_AUTOTUNE", "1") == "0" or problem.rows_per_expert < MIN_ROWS:
        return False
    return not torch.cuda.is_current_stream_capturing()


def _cache_folder() -> Path:
    folder = os.environ.get("SCATTERMOE_CACHE") or Path.home() / ".cache" / "accel_moe"
    # What is fastest depends on the compiler as much as on the chip.
    return Path(folder) / f"triton-{triton.__version__}-{MEANING}"


def _measure_or_wait(problem: Problem, launch: Callable[[Config], _Result]) -> Config:
    """From the cache on disk; or measured under the shape's lock; or, where another process holds it too long, the
    rule.
    """
    folder = _cache_folder()
    entry = folder / (problem.key.replace(" ", "_") + ".json")
    lock = entry.with_suffix(".lock")
    deadline = time.monotonic() + WAIT_S
    while True:
        known = _read(entry)
        if known:
            return known
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            with contextlib.suppress(OSError):
                if time.time() - lock.stat().st_mtime > 3 * WAIT_S:
                    lock.unlink()  # left by a process that died
                    continue
            if time.monotonic() > deadline:
                return rule(problem)
            time.sleep(0.1)
        except OSError as error:  # a read-only home: measure for this process alone
            logger.info("tuned configurations are not kept: %s", error)
            return _fastest(problem, launch)
    try:
        known = _read(entry)  # another process may have finished between our look and our lock
        if known:
            return known
        config = _fastest(problem, launch)
        partial = entry.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(config)))
        partial.replace(entry)  # atomic: a reader sees the whole entry or none
        return config
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()


def _read(entry: Path) -> Config | None:
    """None where there is no entry, or one of another version of this package."""
    try:
        return Config(**json.loads(entry.read_text()))
    except (OSError, ValueError, TypeError):
        return None


_under_way = 0  # measurements


def measuring() -> bool:
    """Whether a launch is one of a measurement."""
    return _under_way > 0


def _fastest(problem: Problem, launch: Callable[[Config], _Result]) -> Config:
    """Times every candidate on this call. Waits for the device: the only host sync in kernels/, once per shape."""
    global _under_way
    deadline, times = time.monotonic() + MEASURE_S, {}
    _under_way += 1
    try:
        for config in candidates(problem):
            if times and time.monotonic() > deadline:
                break
            try:
                times[config] = _time_ms(lambda config=config: launch(config))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # of Gluon, an experimental interface, any; of Triton those that say that a configuration is too large
                if not config.gluon and not isinstance(error, _TOO_LARGE):
                    raise
                logger.debug("%s: %s does not run here: %s", problem.key, config, error)
    finally:
        _under_way -= 1
    if not times:
        return rule(problem)
    best = min(times, key=times.__getitem__)
    logger.info("%s: %s, %.3f ms", problem.key, best, times[best])
    return best


def _time_ms(run: Callable[[], object], repeats: int = 5) -> float:
    """The median time of run, after one call that compiles it and one that warms up."""
    run()
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    marks[-1].synchronize()
    return sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))[repeats // 2]
