"""Launches: from tensors to grids. Checks, buffers, configurations, and the two torch custom ops that the
rest calls.

`experts_forward` and `experts_backward` are opaque to torch.compile and have fake kernels, so that a compiled
layer has no graph break. They only compute: autograd.py says what is saved and which gradients are asked for.
No host sync anywhere.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import gemm, tuning
from .routing import Routing, Tiles, list_tiles, sort_slots
from .tuning import Config, Problem

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_Result = TypeVar("_Result")


def check_runnable(x: Tensor) -> None:
    """Raises ValueError where Triton cannot run."""
    if x.device.type != "cuda" and not _INTERPRETED:
        raise ValueError(
            f"scattermoe runs on a GPU; hidden_states are on {x.device}. Move the model to a GPU, choose "
            f"experts_implementation='grouped_mm', or set TRITON_INTERPRET=1 before Python starts (slow)."
        )


def check_inputs(x: Tensor, w1: Tensor, w2: Tensor, index: Tensor, weights: Tensor) -> None:
    """Raises ValueError when shapes, dtypes or devices do not fit together. x[T,H], w1[E,2I,H], w2[E,H,I],
    [T,K] twice.
    """
    check_runnable(x)
    if x.dtype not in DTYPES or w1.dtype != x.dtype or w2.dtype != x.dtype:
        raise ValueError(
            f"scattermoe needs hidden_states and both weights in one dtype of float32, bfloat16 or float16; "
            f"found hidden_states {x.dtype}, gate_up_proj {w1.dtype}, down_proj {w2.dtype}. Cast them, or use "
            f"torch.autocast."
        )
    num_experts, two_i, hidden = w1.shape
    if x.dim() != 2 or x.shape[1] != hidden or tuple(w2.shape) != (num_experts, hidden, two_i // 2) or two_i % 2:
        raise ValueError(
            f"scattermoe needs hidden_states[T,H], gate_up_proj[E,2I,H], down_proj[E,H,I]; found {tuple(x.shape)}, "
            f"{tuple(w1.shape)}, {tuple(w2.shape)}."
        )
    if index.dim() != 2 or index.shape != weights.shape or index.shape[0] != x.shape[0]:
        raise ValueError(
            f"scattermoe needs top_k_index[T,K] and top_k_weights[T,K] with T = {x.shape[0]}; found "
            f"{tuple(index.shape)} and {tuple(weights.shape)}."
        )
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"scattermoe needs top_k_index in int32 or int64; found {index.dtype}.")


def _on_device(x: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _precision(x: Tensor) -> str:
    """How tl.dot multiplies fp32: as torch.backends.cuda.matmul says. Other dtypes ignore it."""
    return "tf32" if x.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tuned(kernel: str, w2: Tensor, num_rows: int, launch: Callable[[Config], _Result]) -> _Result:
    """Launches one GEMM of the layer with the configuration that suits it."""
    num_experts, hidden, intermediate = w2.shape
    capability = (0, 0) if _INTERPRETED else torch.cuda.get_device_capability(w2.device)
    problem = Problem(kernel, num_rows, num_experts, hidden, intermediate, w2.dtype, capability)
    return launch(tuning.choose(problem, launch))


def _tma_fits(*tensors: Tensor) -> bool:
    """Whether the chip has a copy engine and each tensor meets its rules: 16-byte aligned, innermost
    dimension contiguous.
    """
    if _INTERPRETED or torch.cuda.get_device_capability(tensors[0].device)[0] < 9:
        return False
    return all(
        t.data_ptr() % 16 == 0
        and t.numel() > 0
        and t.stride(-1) == 1
        and all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:-1])
        for t in tensors
    )


def _descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block)


class _Weight:
    """A weight [E, width, depth] as a GEMM reads it: a strided view, and how to hand it to a kernel."""

    def __init__(self, weight: Tensor, depth_last: bool):
        self.view = weight if depth_last else weight.transpose(1, 2)  # [E, width, depth]
        self.k_contiguous = self.view.stride(2) == 1
        self.stored = self.view if self.k_contiguous else self.view.transpose(1, 2)

    def source(self, tma: bool, block_n: int, block_k: int):
        """The kernel's argument: the stored tensor, or a descriptor of it."""
        if not tma:
            return self.stored
        return _descriptor(self.stored, [1, block_n, block_k] if self.k_contiguous else [1, block_k, block_n])

    @property
    def gate_up(self) -> Tensor:
        """The stored tensor with gate and up as a dimension of their own, so that one copy brings a tile of both."""
        return self.stored.unflatten(1 if self.k_contiguous else 2, (2, -1))

    def gate_up_source(self, tma: bool, block_i: int, block_k: int):
        """As source, of `gate_up`."""
        if not tma:
            return self.stored
        return _descriptor(self.gate_up, [1, 2, block_i, block_k] if self.k_contiguous else [1, block_k, 2, block_i])

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.view.stride()


class _TileLists:
    """Tile lists by height, built once per op call."""

    def __init__(self, routing: Routing):
        self.routing, self.by_height = routing, {}

    def __getitem__(self, block_p: int) -> Tiles:
        if block_p not in self.by_height:
            self.by_height[block_p] = list_tiles(self.routing, block_p)
        return self.by_height[block_p]


@dataclass(frozen=True)
class _Padded:
    """x[token] by rows, each expert's padded with zero rows to a multiple of `tiles.block_p` (gemm.gather_rows)."""

    data: Tensor  # [tiles.max_tiles * tiles.block_p, H]
    tiles: Tiles


PAD = 64  # rows; weight_grad's blocks must divide it


def _gather(x: Tensor, routing: Routing, tiles: _TileLists) -> _Padded:
    """x [T, H] -> each row's token, padded per expert."""
    pad, width = tiles[PAD], x.shape[1]
    out = x.new_empty(pad.max_tiles * PAD, width)
    rows = 16 if not _INTERPRETED else PAD
    if out.numel():
        gemm.gather_rows[(pad.max_tiles, PAD // rows)](
            x,
            out,
            routing.row_slot,
            pad.tile_expert,
            pad.tile_offsets,
            routing.expert_offsets,
            width,
            x.stride(0),
            routing.top_k,
            PAD=PAD,
            ROWS=rows,
            BLOCK=min(triton.next_power_of_2(width), 512),
            num_warps=8,
        )
    return _Padded(out, pad)


def _up(x: Tensor, w1: Tensor, routing: Routing, tiles: _TileLists, config: Config, act: str, save: bool):
    """-> h [P, 2I] (empty unless save), a [P, I]."""
    intermediate, hidden = w1.shape[1] // 2, w1.shape[2]
    a = x.new_empty(routing.num_rows, intermediate)
    h = x.new_empty(routing.num_rows if save else 0, 2 * intermediate)
    weight, rows = _Weight(w1, depth_last=True), tiles[config.block_p]
    tma = _tma_fits(weight.gate_up)
    gather = config.gather or not tma
    padded = None if gather else _gather(x, routing, tiles)
    grid = (rows.max_tiles * triton.cdiv(intermediate, config.block_n),)
    if grid[0]:
        gemm.up_projection[grid](
            _descriptor(padded.data, [config.block_p, config.block_k]) if padded else x,
            weight.gate_up_source(tma, config.block_n, config.block_k),
            h,
            a,
            routing.row_slot,
            padded.tiles.tile_offsets if padded else rows.tile_offsets,
            rows.tile_expert,
            rows.tile_offsets,
            routing.expert_offsets,
            hidden,
            intermediate,
            routing.top_k,
            x.stride(0),
            *weight.strides,
            config.group,
            ACT=act,
            STORE_H=save,
            GATHER=gather,
            USE_TMA=tma,
            K_CONTIGUOUS=weight.k_contiguous,
            EVEN=hidden % config.block_k == 0 and (tma or intermediate % config.block_n == 0),
            PRECISION=_precision(x),
            BLOCK_P=config.block_p,
            BLOCK_I=config.block_n,
            BLOCK_K=config.block_k,
            PAD=PAD,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return h, a


def _grouped(a: Tensor, weight: _Weight, routing: Routing, tiles: _TileLists, config: Config) -> Tensor:
    """a [P, depth] times each expert's weight -> [P, width]."""
    width, depth = weight.view.shape[1:]
    y = a.new_empty(routing.num_rows, width)
    rows = tiles[config.block_p]
    tma = _tma_fits(weight.stored, a)
    grid = (rows.max_tiles * triton.cdiv(width, config.block_n),)
    if grid[0]:
        gemm.grouped_rows[grid](
            _descriptor(a, [config.block_p, config.block_k]) if tma else a,
            weight.source(tma, config.block_n, config.block_k),
            y,
            rows.tile_expert,
            rows.tile_offsets,
            routing.expert_offsets,
            routing.num_rows,
            depth,
            width,
            *weight.strides,
            config.group,
            USE_TMA=tma,
            K_CONTIGUOUS=weight.k_contiguous,
            EVEN=depth % config.block_k == 0 and (tma or width % config.block_n == 0),
            PRECISION=_precision(a),
            BLOCK_P=config.block_p,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y


def _sum_slots(y: Tensor, routing: Routing, weights: Tensor | None, num_tokens: int) -> Tensor:
    """y [P, H] -> [T, H]: each token's rows, weighted or plain, k ascending."""
    hidden = y.shape[1]
    out = y.new_empty(num_tokens, hidden)
    block = min(triton.next_power_of_2(hidden), 64 if _INTERPRETED else 2048)
    if out.numel():
        gemm.sum_slots[(num_tokens, triton.cdiv(hidden, block))](
            y,
            routing.slot_row,
            y if weights is None else weights,
            out,
            hidden,
            TOP_K=routing.top_k,
            WEIGHTED=weights is not None,
            BLOCK_H=block,
            num_warps=4,
        )
    return out


def _down_backward(
    dout: _Padded,
    w2: Tensor,
    h: Tensor,
    weights: Tensor,
    routing: Routing,
    tiles: _TileLists,
    config: Config,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dh [P, 2I], sa [P, I], ds partials [parts, P] in fp32. dout is [T, H], or [P, H] if gathered
    already.
    """
    _, hidden, intermediate = w2.shape
    num_rows = routing.num_rows
    dh, sa = torch.empty_like(h), h.new_empty(num_rows, intermediate)
    parts = triton.cdiv(intermediate, config.block_n)
    ds = torch.empty(parts, num_rows, dtype=torch.float32, device=h.device)
    weight, rows = _Weight(w2, depth_last=False), tiles[config.block_p]
    tma = _tma_fits(weight.stored, dout.data)
    if rows.max_tiles:
        gemm.down_backward[(rows.max_tiles * parts,)](
            _descriptor(dout.data, [config.block_p, config.block_k]) if tma else dout.data,
            weight.source(tma, config.block_n, config.block_k),
            h,
            weights,
            dh,
            sa,
            ds,
            routing.row_slot,
            dout.tiles.tile_offsets,
            rows.tile_expert,
            rows.tile_offsets,
            routing.expert_offsets,
            num_rows,
            hidden,
            intermediate,
            *weight.strides,
            config.group,
            ACT=act,
            USE_TMA=tma,
            K_CONTIGUOUS=weight.k_contiguous,
            EVEN=hidden % config.block_k == 0 and (tma or intermediate % config.block_n == 0),
            PRECISION=_precision(h),
            BLOCK_P=config.block_p,
            BLOCK_I=config.block_n,
            BLOCK_K=config.block_k,
            PAD=PAD,
            CHUNKS=config.chunks,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dh, sa, ds


def _zero_tail(first: Tensor, second: Tensor, routing: Routing, tail: int) -> None:
    gemm.zero_tail[(tail,)](
        first,
        second,
        routing.expert_offsets,
        routing.num_experts,
        routing.num_rows,
        first.shape[1],
        second.shape[1],
        BLOCK=1024,
    )


def _routing_grad(ds: Tensor, routing: Routing, like: Tensor) -> Tensor:
    """ds partials [parts, P] -> the gradient of top_k_weights [T, K], in its dtype."""
    out, block = torch.empty_like(like, memory_format=torch.contiguous_format), 256
    if out.numel():
        grid = (triton.cdiv(out.numel(), block),)
        gemm.sum_routing_grad[grid](ds, routing.slot_row, out, out.numel(), routing.num_rows, ds.shape[0], BLOCK=block)
    return out


def _weight_grad(
    left: Tensor | _Padded, right: Tensor | _Padded, routing: Routing, config: Config, scale: float
) -> Tensor:
    """scale * left.T @ right per expert, [E, left width, right width]; exactly one operand is padded."""
    padded = left if isinstance(left, _Padded) else right
    left_data, right_data = (t.data if isinstance(t, _Padded) else t for t in (left, right))
    m, n = left_data.shape[1], right_data.shape[1]
    dw = left_data.new_empty(routing.num_experts, m, n)
    tma = _tma_fits(left_data, right_data)
    block_m, block_n, block_p = config.block_k, config.block_n, config.block_p
    grid = (routing.num_experts * triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
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
            LEFT_PADDED=padded is left,
            USE_TMA=tma,
            EVEN=m % block_m == 0 and n % block_n == 0,
            PRECISION=_precision(left_data),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_P=block_p,
            PAD=PAD,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dw


def _num_rows(index: Tensor, num_pairs: int) -> int:
    return index.numel() if num_pairs < 0 else num_pairs


def _row_major(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


@torch.library.custom_op("accel_moe::experts_forward", mutates_args=())
def experts_forward(
    x: Tensor, w1: Tensor, w2: Tensor, index: Tensor, weights: Tensor, act: str, num_pairs: int, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The layer's forward: x[T,H], w1[E,2I,H], w2[E,H,I], index and weights [T,K].

    num_pairs: slots that are not sentinels, or -1 when unknown. save: whether a backward will follow.
    -> out [T,H], h [P,2I] (0 rows unless save), then the routing: row_slot [P], slot_row [T*K],
    expert_offsets [E+1].
    """
    with _on_device(x):
        x, weights = _row_major(x), weights.contiguous()
        num_experts, num_rows = w1.shape[0], _num_rows(index, num_pairs)
        routing = sort_slots(index, num_experts, num_rows)
        tiles = _TileLists(routing)
        h, a = _tuned("up", w2, num_rows, lambda c: _up(x, w1, routing, tiles, c, act, save))
        y = _tuned("down", w2, num_rows, lambda c: _grouped(a, _Weight(w2, depth_last=True), routing, tiles, c))
        out = _sum_slots(y, routing, weights, x.shape[0])
    return out, h, routing.row_slot, routing.slot_row, routing.expert_offsets


@experts_forward.register_fake
def _(x, w1, w2, index, weights, act, num_pairs, save):
    num_rows = _num_rows(index, num_pairs)
    integers = {"dtype": torch.int32, "device": x.device}
    return (
        x.new_empty(x.shape),
        x.new_empty(num_rows if save else 0, w1.shape[1]),
        torch.empty(num_rows, **integers),
        torch.empty(index.numel(), **integers),
        torch.empty(w1.shape[0] + 1, **integers),
    )


@torch.library.custom_op("accel_moe::experts_backward", mutates_args=())
def experts_backward(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    weights: Tensor,
    h: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    expert_offsets: Tensor,
    act: str,
    weight_grad_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, w1, w2 and weights; a zero-element tensor for each that `needs` (four, that order)
    leaves out.

    Both weight gradients are multiplied by weight_grad_scale before they are rounded to the weights' dtype.
    """
    need_x, need_w1, need_w2, need_weights = needs
    with _on_device(x):
        dout, x, weights = _row_major(dout), _row_major(x), weights.contiguous()
        routing = Routing(row_slot, slot_row, expert_offsets, top_k=weights.shape[1])
        tiles = _TileLists(routing)
        num_rows, scale = routing.num_rows, weight_grad_scale
        dout_rows = _gather(dout, routing, tiles)
        dh, sa, ds = _tuned(
            "down_backward", w2, num_rows, lambda c: _down_backward(dout_rows, w2, h, weights, routing, tiles, c, act)
        )
        dx, dw1, dw2, dweights = (x.new_empty(0) for _ in range(4))  # four: an op's outputs may not alias
        if need_weights:
            dweights = _routing_grad(ds, routing, weights)
        ds = None
        if need_w1 or need_w2:
            _zero_tail(dh, sa, routing, PAD)
        # Each buffer of P rows is freed as soon as its last reader is launched: they decide the peak.
        if need_w2:
            dw2 = _tuned("down_weight_grad", w2, num_rows, lambda c: _weight_grad(dout_rows, sa, routing, c, scale))
        sa = dout_rows = None
        if need_w1:
            x_rows = _gather(x, routing, tiles)
            dw1 = _tuned("up_weight_grad", w2, num_rows, lambda c: _weight_grad(dh, x_rows, routing, c, scale))
            x_rows = None
        if need_x:
            weight = _Weight(w1, depth_last=False)
            dx_rows = _tuned("up_backward", w2, num_rows, lambda c: _grouped(dh, weight, routing, tiles, c))
            dh = None
            dx = _sum_slots(dx_rows, routing, None, x.shape[0])
    return dx, dw1, dw2, dweights


@experts_backward.register_fake
def _(dout, x, w1, w2, weights, h, row_slot, slot_row, expert_offsets, act, weight_grad_scale, needs):
    likes = (x, w1, w2, weights)
    return tuple(like.new_empty(like.shape if need else (0,)) for like, need in zip(likes, needs, strict=True))
