"""What the backward keeps and which gradients it computes: the ops of ops.py joined under torch.autograd.

Saved are x, the weights and top_k_weights (held by others anyway), the pre-activation h [P, 2I] (its first rows,
where P is counted later: DeferredCount; nothing of it, where it is to be computed again) and the routing as int32. Of a
low-rank change its factors are saved, and the narrow rows [P, R] that forward made.
Weights in another dtype than x (fp32 master weights under bf16 compute) are cast for the products, in forward and again
in backward, so that no copy of them is kept; their gradients are written once, in their own dtype, from the fp32
accumulators.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import launch, low_rank, ops
from .casts import Casts
from .deferred_count import DeferredCount
from .glu import Glu
from .hints import NO_HINTS, Hints


def _where_needed(gradients: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


class _Experts(torch.autograd.Function):
    """The whole layer, fused. Of the parameters (w1, w2, b1, b2) only what `casts` makes of them is computed with."""

    @staticmethod
    def forward(ctx, x, w1, w2, b1, b2, index, weights, kind, hints: Hints, *factors):
        parameters, casts, keep_h = (w1, w2, b1, b2), hints.casts, not hints.recompute_up
        later = hints.num_pairs if isinstance(hints.num_pairs, DeferredCount) else None
        pairs, likely = _rows_of(hints.num_pairs, index)
        forward = ops.bypass_dispatcher(ops.experts_forward, x)
        sizes = pairs, likely, likely if keep_h else 0
        changes = list(factors), _scales(hints)
        out, h, *rest = forward(x, *_taken(casts, parameters), *changes, index, weights, *kind, *sizes)
        ctx.save_for_backward(*factors, x, *parameters, weights, h, *rest)
        ctx.num_factors = len(factors)
        ctx.kind, ctx.scale, ctx.later, ctx.scales = kind, hints.weight_grad_scale, later, changes[1]
        ctx.filled = later is not None or pairs >= 0
        ctx.likely, ctx.keep_h = likely, keep_h
        ctx.casts = casts if casts is not None and casts.of_module else None
        ctx.on_input_grads = hints.on_input_grads
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        *need_tensors, _, need_weights = ctx.needs_input_grad[:7]
        needs = [*need_tensors, need_weights, *ctx.needs_input_grad[9:]]
        kept = ctx.saved_tensors  # asked for once: checkpointing computes them at the first time
        factors, (x, w1, w2, b1, b2, *saved) = list(kept[: ctx.num_factors]), kept[ctx.num_factors :]
        parameters = (w1, w2, b1, b2)
        learning = [p.dtype for p, need in zip(parameters, need_tensors[1:], strict=True) if need]
        dtype = functools.reduce(torch.promote_types, learning, x.dtype)
        # not kept from forward, and of the saved tensors, so that nothing outlives them
        casts = _cast(parameters, x.dtype) if ctx.casts is None else _taken(ctx.casts, parameters)
        options = *ctx.kind, ctx.scale, dtype, ctx.filled, needs
        saved = _whole(ctx, x, casts, factors, *saved)
        backward = ops.bypass_dispatcher(ops.experts_backward, x)
        early = {} if backward is ops.experts_backward else {"on_input_grads": ctx.on_input_grads}
        gradients = backward(dout, x, *casts, factors, ctx.scales, *saved, *options, **early)
        dx, dw1, dw2, db1, db2, dweights, *dfactors = _where_needed(gradients, needs)
        return dx, dw1, dw2, db1, db2, None, dweights, None, None, *dfactors


def _check_devices(x: Tensor, **others: Tensor) -> None:
    """Launches pass addresses, which nobody checks any more."""
    for name, tensor in others.items():
        if tensor.device != x.device:
            raise ValueError(
                f"scattermoe needs all tensors on one device; found hidden_states on {x.device} and {name} on "
                f"{tensor.device}. Move the layer, or its input."
            )


def _scales(hints: Hints) -> list[float]:
    return [1.0 if change is None else change.scale for change in hints.changes]


def _factors(hints: Hints) -> list[Tensor | None]:
    """Those of ops.py, their rank padded to the kernels'. Empty if nothing is changed."""
    if hints.changes == (None, None):
        return []
    pairs = [(None, None) if c is None else (low_rank.padded(c.inner), low_rank.padded(c.outer)) for c in hints.changes]
    return [factor for pair in pairs for factor in pair]


def _rows_of(num_pairs: int | DeferredCount | None, index: Tensor) -> tuple[int, int]:
    """`num_pairs` and `likely` for ops.experts_forward."""
    slots = index.numel()
    if isinstance(num_pairs, DeferredCount):
        return -1, num_pairs.likely(slots)
    return (-1, slots) if num_pairs is None else (num_pairs, num_pairs)


def _whole(ctx, x, casts, factors, weights, h, up_narrow, down_narrow, *routing) -> tuple[Tensor, ...]:
    """Trim the saved buffers to the rows in use, and compute h again where it was not kept whole."""
    row_slot, slot_row, expert_offsets = routing
    factor = factors[1] if factors else None
    pairs = row_slot.shape[0]
    if ctx.later is not None:
        pairs = ctx.later.wait()
        row_slot = row_slot[:pairs]
        up_narrow, down_narrow, h = up_narrow[:pairs], down_narrow[:pairs], h[:pairs]
    if not ctx.keep_h or (ctx.later is not None and h.shape[0] < pairs):
        w1, w2, b1, _ = casts
        again = ops.bypass_dispatcher(ops.pre_activation, x)
        h = again(x, w1, w2, b1, factor, up_narrow, row_slot, slot_row, expert_offsets, *ctx.kind, ctx.likely)
    return weights, h, up_narrow, down_narrow, row_slot, slot_row, expert_offsets


def _cast(parameters: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(None if p is None else p.to(dtype) for p in parameters)


def _taken(casts: Casts | None, parameters: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The parameters as they are computed with."""
    if casts is None:
        return parameters
    made = iter(casts.take())
    return tuple(None if p is None else next(made) for p in parameters)


class ExpertWeights(NamedTuple):
    """The parameters of one experts layer.

    Attributes:
        up: [E, 2I, H], or [E, I, H] without a gate.
        down: [E, H, I].
        up_bias, down_bias: [E, 2I or I] and [E, H], or None.
        transposed: the last two dimensions of `up` and `down` are swapped.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    transposed: bool = False


def experts(
    x: Tensor, weights: ExpertWeights, index: Tensor, top_k_weights: Tensor, glu: Glu, hints: Hints = NO_HINTS
) -> Tensor:
    """The fused layer with gradients: x [T, H], index [T, K], top_k_weights [T, K] -> [T, H] in x's dtype.

    Slots with an index outside 0..E-1 are sentinels: no work, no contribution, gradient exactly 0. Differentiable in x,
    top_k_weights and the weights.

    Raises:
        ValueError: tensors that do not fit together, or a device or dtype that the kernels cannot run on.
    """
    *parameters, transposed = weights
    dtypes = (weights.up.dtype, weights.down.dtype) if hints.casts is None else (x.dtype, x.dtype)
    layer = launch.Layer.of(weights.up, weights.down, glu.gated, transposed)
    launch.check_inputs(x, dtypes, index, top_k_weights, layer)
    _check_devices(x, top_k_index=index, top_k_weights=top_k_weights, up=weights.up, down_proj=weights.down)
    kind = (glu.act, glu.numbers, glu.gated, transposed)
    factors = _factors(hints)
    learns = (t for t in (x, *parameters, top_k_weights, *factors) if t is not None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in learns):
        return _Experts.apply(x, *parameters, index, top_k_weights, kind, hints, *factors)
    forward = ops.bypass_dispatcher(ops.experts_forward, x)
    sizes = *_rows_of(hints.num_pairs, index), 0
    changes = factors, _scales(hints)
    out, *_ = forward(x, *_taken(hints.casts, tuple(parameters)), *changes, index, top_k_weights, *kind, *sizes)
    return out
