"""Launches of hopper.py, hopper_backward.py and hopper_gradients.py, as launch.py's of gemm.py: from tensors to grids.

Imported only where Gluon is (roads.gluon_road). Weights, rows and tiles come as launch.py has them.
"""

import functools
from dataclasses import replace

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import hopper, hopper_backward, hopper_gradients, hopper_parts
from .tuning import Config, beside_collectives


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    names = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    return gl.NVMMASharedLayout.get_default_for(list(block), names[dtype])


def _descriptor(t: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block), _layout(block, t.dtype))


def _clipped(t: Tensor, *block: int) -> TensorDescriptor:
    """Of rows t [R, ...], whose stores end at any row (`hopper_parts.clipped_rows` has the coordinates)."""
    stride, block = t.stride(0), (1, 1, *block)
    shape = [2**31 - 2**16, 2**31 - 2**16, hopper_parts.MANY.value, *t.shape[1:]]
    return TensorDescriptor(t, shape, [2**34 - stride, stride, *t.stride()], list(block), _layout(block, t.dtype))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _programs(device: torch.device, tiles: int) -> int:
    """One for each multiprocessor. Beside collectives, which hold some of them, four with smaller shares of the tiles:
    a program that waits for a multiprocessor holds up its GEMM."""
    return min(_multiprocessors(device) * (4 if beside_collectives() else 1), tiles)


def _options(tile: Config) -> dict[str, object]:
    # 168 registers a thread at the start: what 12 warps have; the loader then gives most of its own away
    return {"TILE": tile, "num_warps": tile.num_warps, "maxnreg": 168}


def grouped_rows(a: Tensor, weight, bias: Tensor | None, y: Tensor, routing, rows, loads, tile: Config) -> None:
    """Writes y [P, width]. weight: launch.Weight; rows: the tiles of height tile.block_p, not none."""
    m, n, k = tile.block_p, tile.block_n, tile.block_k
    grid = _programs(a.device, rows.max_tiles * triton.cdiv(weight.width, n))
    hopper.grouped_rows[(grid,)](
        _descriptor(a, m, k),
        _descriptor(weight.stored, 1, *((n, k) if weight.k_contiguous else (k, n))),
        _clipped(y, m, 64),
        a if bias is None else bias,
        rows.tile_expert,
        rows.tile_offsets,
        routing.expert_offsets,
        routing.num_experts,
        weight.depth,
        weight.width,
        LOADS=replace(loads, pad=0),
        **_options(tile),
    )


def up_projection(
    x: Tensor,
    padded,
    weight,
    bias: Tensor | None,
    h: Tensor,
    a: Tensor,
    routing,
    rows,
    gate,
    stores,
    loads,
    tile: Config,
) -> None:
    """Writes h and a, those that `stores` asks for. padded: x gathered before (gathered.Padded), or None."""
    m, n, k = tile.block_p, tile.block_n, tile.block_k
    intermediate = a.shape[1]
    h = h if stores.h else a.new_empty(1, weight.width)  # stands for what is not written
    a = a if stores.a else a.new_empty(1, intermediate)
    if gate.gated and not gate.interleaved:
        w_desc = _descriptor(weight.stored.unflatten(1, (2, -1)), 1, 2, n, k)
        h_desc = _clipped(h.unflatten(1, (2, -1)), m, 1, 64)
    else:
        wide = 2 * n if gate.gated else n
        w_desc = _descriptor(weight.stored, 1, *((wide, k) if weight.k_contiguous else (k, wide)))
        h_desc = _clipped(h, m, 64)
    grid = _programs(x.device, rows.max_tiles * triton.cdiv(intermediate, n))
    hopper.up_projection[(grid,)](
        _descriptor(padded.data, m, k) if padded else x,
        w_desc,
        h_desc,
        _clipped(a, m, 64),
        x if bias is None else bias,
        padded.tiles.tile_offsets if padded else routing.row_slot,
        rows.tile_expert,
        rows.tile_offsets,
        routing.expert_offsets,
        routing.num_experts,
        weight.depth,
        intermediate,
        routing.top_k,
        x.stride(0),
        h.shape[0],
        LOADS=replace(loads, pad=padded.tiles.block_p if padded else 0),
        GLU=gate,
        STORES=stores,
        **_options(tile),
    )


def down_backward(
    dout, weight, h: Tensor, weights: Tensor, outputs: tuple[Tensor, ...], routing, rows, gate, loads, tile: Config
) -> None:
    """Writes outputs: dh, sa and ds. dout: gathered.Gathered. tile: of 128 rows x 256 columns, with 4 warps a
    finisher."""
    dh, sa, ds = outputs
    padded = None if tile.gather else dout.padded
    m, n, k = tile.block_p, tile.block_n, tile.block_k
    part = m // hopper_backward.FINISHERS.value  # rows of a finisher
    if gate.gated and not gate.interleaved:
        h_desc = _descriptor(h.unflatten(1, (2, -1)), m, 1, 64)
        dh_desc = _clipped(dh.unflatten(1, (2, -1)), part, 1, 64)
    else:
        h_desc, dh_desc = _descriptor(h, m, 64), _clipped(dh, part, 64)
    grid = _programs(h.device, rows.max_tiles * triton.cdiv(weight.width, n))
    hopper_backward.down_backward[(grid,)](
        _descriptor(padded.data, m, k) if padded else dout.x,
        _descriptor(weight.stored, 1, *((n, k) if weight.k_contiguous else (k, n))),
        h_desc,
        dh_desc,
        _clipped(sa, part, 64),
        weights,
        ds,
        padded.tiles.tile_offsets if padded else routing.row_slot,
        routing.row_slot,
        rows.tile_expert,
        rows.tile_offsets,
        routing.expert_offsets,
        routing.num_experts,
        ds.shape[1],
        weight.depth,
        weight.width,
        routing.top_k,
        dout.x.stride(0),
        GLU=gate,
        LOADS=replace(loads, gather=padded is None, pad=padded.tiles.block_p if padded else 0),
        **_options(tile),
    )


def weight_grad(gathered, other: Tensor, is_left: bool, dw: Tensor, routing, scale: float, tile: Config) -> None:
    """Writes dw [E, M, N]. gathered.Gathered, the left operand if is_left; other: of as many rows [P, N or M]."""
    m, n, rows = tile.block_k, tile.block_n, tile.block_p
    tiles = routing.num_experts * triton.cdiv(dw.shape[1], m) * triton.cdiv(dw.shape[2], n)
    x, padded = gathered.x, None if tile.gather else gathered.padded
    hopper_gradients.weight_grad[(_programs(other.device, tiles),)](
        _descriptor(padded.data, rows, m if is_left else n) if padded else x,
        _descriptor(other, rows, n if is_left else m),
        _descriptor(dw, 1, m, 128 // dw.element_size()),
        gathered.tiles.largest_first,
        routing.expert_offsets,
        padded.tiles.tile_offsets if padded else routing.row_slot,
        routing.num_experts,
        dw.shape[1],
        dw.shape[2],
        x.stride(0),
        scale,
        tile.group,
        GATHER=padded is None,
        LEFT=is_left,
        TOP_K=routing.top_k,
        PAD=padded.tiles.block_p if padded else 0,
        **_options(tile),
    )
