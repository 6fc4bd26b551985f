"""Launches: from tensors to grids. One function per kernel: checks, buffers, descriptors, configuration.

ops.py joins them into the layer's forward and backward. No host sync anywhere.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import gemm, roads, tuning
from .arithmetic import cdiv
from .gathered import INTERPRETED, PAD, Gathered, TileLists
from .glu import Glu
from .routing import Routing
from .tuning import Config, Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_Result = TypeVar("_Result")


def check_runnable(x: Tensor) -> None:
    """Raises ValueError where Triton cannot run, or not rightly."""
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"scattermoe runs on a GPU; hidden_states are on {x.device}. Move the model to a GPU, choose "
            f"experts_implementation='grouped_mm', or set TRITON_INTERPRET=1 before Python starts (slow)."
        )
    if x.dtype == torch.bfloat16 and INTERPRETED:
        raise ValueError(
            "scattermoe cannot compute in bfloat16 under TRITON_INTERPRET=1: the interpreter's products of bfloat16 "
            "are wrong by orders of magnitude. Use float32 or float16 there, or moe_kernel: grouped_mm."
        )


class Layer(NamedTuple):
    """The kind and the size of an experts layer, read off its weights."""

    num_experts: int
    hidden: int
    intermediate: int
    gated: bool
    transposed: bool  # weights stored [E, in, out], as in gpt_oss, not [E, out, in]

    @classmethod
    def of(cls, w1: Tensor, w2: Tensor, gated: bool, transposed: bool) -> "Layer":
        """From the up-projection [E, 2I or I, H] and the down-projection [E, H, I]; the last two swapped if
        transposed.

        Raises ValueError when they do not fit together.
        """
        up, down = (w.transpose(1, 2) if transposed and w.ndim == 3 else w for w in (w1, w2))
        width = 2 if gated else 1
        if w1.ndim != 3 or w2.ndim != 3 or up.shape != (down.shape[0], width * down.shape[2], down.shape[1]):
            form = "[E,H,2I] and down_proj[E,I,H]" if transposed else "[E,2I,H] and down_proj[E,H,I]"
            raise ValueError(
                f"scattermoe needs the up-projection{form if gated else form.replace('2I', 'I')}; found "
                f"{tuple(w1.shape)} and {tuple(w2.shape)}."
            )
        return cls(down.shape[0], down.shape[1], down.shape[2], gated, transposed)


def check_inputs(
    x: Tensor, weight_dtypes: tuple[torch.dtype, torch.dtype], index: Tensor, weights: Tensor, layer: Layer
) -> None:
    """Raises ValueError when x[T,H], index[T,K] and weights[T,K] do not fit together or with the layer's weights."""
    check_runnable(x)
    up, down = weight_dtypes
    if x.dtype not in DTYPES or up != x.dtype or down != x.dtype:
        raise ValueError(
            f"scattermoe needs hidden_states and both weights in one dtype of float32, bfloat16 or float16; "
            f"found hidden_states {x.dtype}, up-projection {up}, down_proj {down}. Cast them, or use "
            f"torch.autocast."
        )
    if x.ndim != 2 or x.shape[1] != layer.hidden:
        raise ValueError(f"scattermoe needs hidden_states[T,{layer.hidden}]; found {tuple(x.shape)}.")
    if index.ndim != 2 or index.shape != weights.shape or index.shape[0] != x.shape[0]:
        raise ValueError(
            f"scattermoe needs top_k_index[T,K] and top_k_weights[T,K] with T = {x.shape[0]}; found "
            f"{tuple(index.shape)} and {tuple(weights.shape)}."
        )
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"scattermoe needs top_k_index in int32 or int64; found {index.dtype}.")


_HERE = contextlib.nullcontext()


def on_device(x: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    here = x.device.type != "cuda" or torch.cuda.current_device() == x.device.index
    return _HERE if here else torch.cuda.device(x.device)


def precision(x: Tensor) -> str:
    """How tl.dot multiplies fp32: as torch.backends.cuda.matmul says. Other dtypes ignore it."""
    return "tf32" if x.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return (0, 0) if INTERPRETED else torch.cuda.get_device_capability(device)


def tuned(
    kernel: str, layer: Layer, rows: int, x: Tensor, launch: Callable[[Config], _Result], term: "Term | None" = None
) -> _Result:
    """Launches one GEMM of the layer with the configuration that suits it; x only names dtype and device. term: the
    GEMM's, which only gemm.py's kernels add."""
    return launch(tuning.choose(_problem(kernel, layer, rows, x, term is not None), launch))


def likely_height(kernel: str, layer: Layer, rows: int, x: Tensor, low_rank: bool) -> int:
    """The height of row tiles that `tuned` takes, as long as nothing is to be measured. low_rank: with a term."""
    return tuning.expected(_problem(kernel, layer, rows, x, low_rank)).block_p


def _problem(kernel: str, layer: Layer, rows: int, x: Tensor, low_rank: bool) -> Problem:
    capability = _capability(x.device)
    gluon = (
        not low_rank
        and capability[0] == 9
        and x.dtype != torch.float32
        and layer.hidden % 8 == layer.intermediate % 8 == 0
        and roads.gluon_road() is not None
    )
    return Problem(kernel, rows, layer.num_experts, layer.hidden, layer.intermediate, x.dtype, capability, gluon)


def _tma_fits(*tensors: Tensor) -> bool:
    """Whether the chip has a copy engine and each tensor meets its rules: 16-byte aligned, innermost
    dimension contiguous.
    """
    return _capability(tensors[0].device)[0] >= 9 and all(map(_fits, tensors))


def _fits(t: Tensor) -> bool:
    *strides, last = t.stride()
    if last != 1 or t.data_ptr() % 16 or not t.numel():
        return False
    size = t.element_size()
    return all(stride * size % 16 == 0 for stride in strides)


def _descriptor(
    t: Tensor, block: list[int], shape: Sequence[int] = (), strides: Sequence[int] = ()
) -> TensorDescriptor:
    """For a tensor that `_tma_fits`. The class would check that again, at every launch. shape, strides: others than
    the tensor's."""
    made = object.__new__(TensorDescriptor)
    made.base, made.block_shape = t, block  # pyright: ignore
    made.shape, made.strides = shape or t.shape, strides or t.stride()  # pyright: ignore
    return made


@dataclass(frozen=True)
class Loads:
    """How a GEMM's operands are loaded. A constant of the kernels."""

    tma: bool  # by descriptor, not by pointers
    even: bool  # no load crosses an edge
    k_contiguous: bool  # a weight's summed dimension is the one without a stride
    precision: str  # of fp32 products
    bias: bool = False
    gather: bool = False  # `up_projection`: rows are gathered by the loads
    pad: int = PAD  # each expert's padded rows are a multiple of it
    rank: int = 0  # columns of a low-rank term; 0: there is none


@dataclass(frozen=True)
class Stores:
    """What `up_projection` writes. A constant of the kernel."""

    h: bool
    a: bool


# One object for each: a constant that is the same object is found again without comparing its fields.
_loads, _stores = functools.lru_cache(256)(Loads), functools.lru_cache(4)(Stores)


class Term(NamedTuple):
    """A low-rank term of a GEMM: rows @ factor[e] is added to the product. low_rank.py makes the rows."""

    rows: Tensor  # [P, R]
    factor: Tensor  # [E, R, width]


def _parts(term: Term | None, like: Tensor) -> tuple[Tensor, Tensor, int]:
    """The kernel's arguments and R; any tensor stands for those that are not there."""
    return (like, like, 0) if term is None else (term.rows, term.factor, term.rows.shape[1])


class Weight:
    """A weight [E, width, depth] as a GEMM reads it: contiguous as [E, width, depth], or as [E, depth, width] if not
    k_contiguous."""

    def __init__(self, weight: Tensor, depth_last: bool):
        swapped = not weight.is_contiguous() and weight.mT.is_contiguous()
        self.stored = weight.mT if swapped else weight.contiguous()
        self.k_contiguous = depth_last != swapped
        self.width, self.depth = self.stored.shape[1:] if self.k_contiguous else self.stored.shape[:0:-1]

    def source(self, tma: bool, block_n: int, block_k: int):
        """The kernel's argument: the stored tensor, or a descriptor of it."""
        if not tma:
            return self.stored
        return _descriptor(self.stored, [1, block_n, block_k] if self.k_contiguous else [1, block_k, block_n])

    def gate_up_source(self, tma: bool, block_i: int, block_k: int):
        """As source, with gate and up as a dimension of their own, so that one copy brings a tile of both."""
        if not tma:
            return self.stored
        (experts, rows, columns), (of_expert, of_row, _) = self.stored.shape, self.stored.stride()
        if self.k_contiguous:
            shape, strides = (experts, 2, rows // 2, columns), (of_expert, rows // 2 * of_row, of_row, 1)
            return _descriptor(self.stored, [1, 2, block_i, block_k], shape, strides)
        shape, strides = (experts, rows, 2, columns // 2), (of_expert, of_row, columns // 2, 1)
        return _descriptor(self.stored, [1, block_k, 2, block_i], shape, strides)

    def fits_tma(self, halves: bool) -> bool:
        """Whether source, or gate_up_source if halves, can be a descriptor."""
        half_row = self.stored.shape[2] // 2 * self.stored.element_size()
        return _tma_fits(self.stored) and (not halves or self.k_contiguous or half_row % 16 == 0)


def up_projection(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    routing: Routing,
    tiles: TileLists,
    config: Config,
    gate: Glu,
    h_rows: int,
    term: Term | None = None,
    activate: bool = True,
) -> tuple[Tensor, Tensor]:
    """-> h [h_rows, 2I or I], its first rows where that is less than P, and a [P, I] (0 rows unless activate)."""
    width, hidden = weight.width, weight.depth
    intermediate = width // 2 if gate.gated else width
    halves = gate.gated and not gate.interleaved  # one copy then brings a tile of both
    a = x.new_empty(routing.num_rows if activate else 0, intermediate)
    h = x.new_empty(h_rows, width)
    rows = tiles[config.block_p]
    tma = weight.fits_tma(halves)
    gather = config.gather or not tma or hidden * x.element_size() % 16 != 0  # the copy's rows, too, are read by TMA
    padded = None if gather else Gathered(x, routing, tiles).padded
    source = weight.gate_up_source if halves else weight.source
    block_n = config.block_n * (2 if gate.interleaved else 1)
    even = hidden % config.block_k == 0 and (tma or intermediate % config.block_n == 0)
    low_rank, factor, rank = _parts(term, x)
    stores = _stores(h_rows > 0, activate)
    loads = _loads(tma, even, weight.k_contiguous, precision(x), bias is not None, gather, rank=rank)
    fits = even and x.stride(0) % 16 == 0 and _tma_fits(x) if gather else True  # whole copies of 16 bytes
    runs = tma and rank == 0 and rows.max_tiles > 0 and fits and (weight.k_contiguous or not halves)
    on_rows = x, padded, weight, bias, h, a, routing, rows, gate, stores, loads
    if roads.on_hopper("up_projection", config, runs, *on_rows):
        return h, a
    config = config.plain
    grid = (rows.max_tiles * cdiv(intermediate, config.block_n),)
    if grid[0]:
        gemm.up_projection[grid](
            _descriptor(padded.data, [config.block_p, config.block_k]) if padded else x,
            source(tma, block_n, config.block_k),
            x if bias is None else bias,
            low_rank,
            factor,
            h,
            a,
            padded.tiles.tile_offsets if padded else routing.row_slot,
            rows.tile_expert,
            rows.tile_offsets,
            routing.expert_offsets,
            hidden,
            intermediate,
            routing.top_k,
            x.stride(0),
            h_rows,
            GLU=gate,
            STORES=stores,
            LOADS=loads,
            TILE=config,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return h, a


def grouped_rows(
    a: Tensor,
    weight: Weight,
    bias: Tensor | None,
    routing: Routing,
    tiles: TileLists,
    config: Config,
    term: Term | None = None,
) -> Tensor:
    """a [P, depth] times each expert's weight (+ bias [E, width], + term) -> [P, width]."""
    width, depth = weight.width, weight.depth
    y = a.new_empty(routing.num_rows, width)
    rows = tiles[config.block_p]
    tma = _tma_fits(weight.stored, a)
    even = depth % config.block_k == 0 and (tma or width % config.block_n == 0)
    low_rank, factor, rank = _parts(term, a)
    loads = _loads(tma, even, weight.k_contiguous, precision(a), bias is not None, rank=rank)
    runs = tma and rank == 0 and rows.max_tiles > 0
    if roads.on_hopper("grouped_rows", config, runs, a, weight, bias, y, routing, rows, loads):
        return y
    config = config.plain
    grid = (rows.max_tiles * cdiv(width, config.block_n),)
    if grid[0]:
        gemm.grouped_rows[grid](
            _descriptor(a, [config.block_p, config.block_k]) if tma else a,
            weight.source(tma, config.block_n, config.block_k),
            a if bias is None else bias,
            low_rank,
            factor,
            y,
            rows.tile_expert,
            rows.tile_offsets,
            routing.expert_offsets,
            depth,
            width,
            LOADS=loads,
            TILE=config,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y


def down_backward(
    dout: Gathered,
    weight: Weight,
    h: Tensor,
    weights: Tensor,
    routing: Routing,
    tiles: TileLists,
    config: Config,
    gate: Glu,
    term: Term | None = None,
    extra_parts: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dh as h, sa [P, I], ds partials [parts, P] in fp32, of which the last extra_parts are left to the caller."""
    intermediate, hidden, num_rows = weight.width, weight.depth, routing.num_rows
    dh, sa = torch.empty_like(h), h.new_empty(num_rows, intermediate)
    parts = cdiv(intermediate, config.block_n)
    ds = torch.empty(parts + extra_parts, num_rows, dtype=torch.float32, device=h.device)
    rows = tiles[config.block_p]
    low_rank, factor, rank = _parts(term, h)
    config, fits = _for_rows(dout, config, weight.stored, h)
    # the copy engine steps by whole 16 bytes: over rows of sa, and from gate to up
    runs = fits and rank == 0 and rows.max_tiles > 0 and intermediate % 8 == 0
    loads = _loads(True, True, weight.k_contiguous, precision(h))
    operands = dout, weight, h, weights, (dh, sa, ds), routing, rows, gate, loads
    if roads.on_hopper("down_backward", config, runs, *operands):
        return dh, sa, ds
    config, padded = config.plain, dout.padded
    tma = _tma_fits(weight.stored, padded.data)
    even = hidden % config.block_k == 0 and (tma or intermediate % config.block_n == 0)
    if rows.max_tiles:
        gemm.down_backward[(rows.max_tiles * parts,)](
            _descriptor(padded.data, [config.block_p, config.block_k]) if tma else padded.data,
            weight.source(tma, config.block_n, config.block_k),
            low_rank,
            factor,
            h,
            weights,
            dh,
            sa,
            ds,
            routing.row_slot,
            padded.tiles.tile_offsets,
            rows.tile_expert,
            rows.tile_offsets,
            routing.expert_offsets,
            num_rows,
            hidden,
            intermediate,
            GLU=gate,
            LOADS=_loads(tma, even, weight.k_contiguous, precision(h), rank=rank),
            TILE=config,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dh, sa, ds


def _for_rows(rows: Gathered, config: Config, *others: Tensor) -> tuple[Config, bool]:
    """A configuration of Gluon's, without `gather` where loads cannot gather these rows; and whether the copy engine
    takes all else that it reads and writes."""
    if not config.gluon:
        return config, False
    if config.gather and not rows.loadable:
        config = replace(config, gather=False)
    known = all(t.dtype in DTYPES for t in others)
    return config, known and _tma_fits(*others, *([] if config.gather else [rows.padded.data]))


def weight_grad(
    left: Tensor | Gathered,
    right: Tensor | Gathered,
    routing: Routing,
    config: Config,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """scale * left.T @ right per expert, [E, left width, right width] in dtype; exactly one operand is Gathered."""
    is_left = isinstance(left, Gathered)
    rows, plain = (left, right) if is_left else (right, left)
    assert isinstance(rows, Gathered) and isinstance(plain, Tensor)
    m, n = (rows.x.shape[1], plain.shape[1]) if is_left else (plain.shape[1], rows.x.shape[1])
    dw = plain.new_empty(routing.num_experts, m, n, dtype=dtype)
    config, runs = _for_rows(rows, config, plain, dw)
    if roads.on_hopper("weight_grad", config, runs, rows, plain, is_left, dw, routing, float(scale)):
        return dw
    config = config.plain
    padded = rows.padded
    left_data, right_data = (padded.data, plain) if is_left else (plain, padded.data)
    tma = _tma_fits(left_data, right_data)
    block_m, block_n, block_p = config.block_k, config.block_n, config.block_p
    grid = (routing.num_experts * cdiv(m, block_m) * cdiv(n, block_n),)
    if grid[0]:
        gemm.weight_grad[grid](
            _descriptor(left_data, [block_p, block_m]) if tma else left_data,
            _descriptor(right_data, [block_p, block_n]) if tma else right_data,
            dw,
            routing.expert_offsets,
            padded.tiles.tile_offsets,
            m,
            n,
            scale,
            config.group,
            LEFT_PADDED=is_left,
            USE_TMA=tma,
            EVEN=m % block_m == 0 and n % block_n == 0,
            PRECISION=precision(left_data),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_P=block_p,
            PAD=PAD,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dw


def row_major(t: Tensor) -> Tensor:
    """t with its last dimension contiguous and rows that do not overlap; a copy where it is not so."""
    return t if t.stride(-1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()
