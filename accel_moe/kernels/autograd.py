"""What the backward keeps and which gradients it computes: the ops of ops.py joined under torch.autograd.

Fused, saved are x, the weights and top_k_weights (held by others anyway), the pre-activation h [P, 2I] (its first rows,
where P is counted later: counts.LaterPairs; nothing of it, where it is to be computed again) and the routing as int32.
Weights in another dtype than x (fp32 master weights under bf16 compute) are cast for the products, in forward and again
in backward, so that no copy of them is kept; their gradients are written once, in their own dtype, from the fp32
accumulators. In two halves, what the gate's own torch operations save comes on top: h, its output a [P, I], and their
like.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import launch, ops
from .casts import Casts
from .deferred_count import LaterPairs


def _where_needed(gradients: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


class _Experts(torch.autograd.Function):
    """The whole layer, fused. Of the parameters (w1, w2, b1, b2) only what `casts` makes of them is computed with."""

    @staticmethod
    def forward(ctx, x, w1, w2, b1, b2, index, weights, kind, num_pairs, scale, casts, rows_ready, keep_h):
        parameters, later = (w1, w2, b1, b2), num_pairs if isinstance(num_pairs, LaterPairs) else None
        pairs, likely = _rows_of(num_pairs, index)
        forward = ops.direct(ops.experts_forward, x)
        sizes = pairs, likely, likely if keep_h else 0
        out, h, *routing = forward(x, *_taken(casts, parameters), index, weights, *kind, *sizes)
        ctx.save_for_backward(x, *parameters, weights, h, *routing)
        ctx.kind, ctx.scale, ctx.later, ctx.filled = kind, scale, later, later is not None or pairs >= 0
        ctx.likely, ctx.keep_h = likely, keep_h
        ctx.casts, ctx.rows_ready = casts if casts is not None and casts.of_module else None, rows_ready
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        *need_tensors, _, need_weights = ctx.needs_input_grad[:7]
        needs = [*need_tensors, need_weights]
        x, w1, w2, b1, b2, *saved = ctx.saved_tensors
        parameters = (w1, w2, b1, b2)
        learning = [p.dtype for p, need in zip(parameters, need_tensors[1:], strict=True) if need]
        dtype = functools.reduce(torch.promote_types, learning, x.dtype)
        # not kept from forward, and of the saved tensors, so that nothing outlives them
        casts = _cast(parameters, x.dtype) if ctx.casts is None else _taken(ctx.casts, parameters)
        options = *ctx.kind, ctx.scale, dtype, ctx.filled, needs
        saved = _whole(ctx.later, ctx.keep_h, ctx.likely, ctx.kind, x, casts, *saved)
        backward = ops.direct(ops.experts_backward, x)
        early = {} if backward is ops.experts_backward else {"rows_ready": ctx.rows_ready}
        gradients = backward(dout, x, *casts, *saved, *options, **early)
        *gradients, dweights = _where_needed(gradients, needs)
        return *gradients, None, dweights, None, None, None, None, None, None


def _rows_of(num_pairs: int | LaterPairs, index: Tensor) -> tuple[int, int]:
    """As ops.experts_forward wants them: num_pairs, and likely."""
    slots = index.numel()
    if isinstance(num_pairs, LaterPairs):
        return -1, num_pairs.likely(slots)
    return num_pairs, slots if num_pairs < 0 else num_pairs


def _whole(
    later: LaterPairs | None, keep_h: bool, likely: int, kind, x, casts, weights, h, row_slot, slot_row, expert_offsets
) -> tuple[Tensor, ...]:
    """What the forward saved, with as many rows as it turned out to use, and all of h."""
    if later is not None:
        row_slot = row_slot[: later.wait()]
    pairs = row_slot.shape[0]
    if not keep_h or (later is not None and h.shape[0] < pairs):
        w1, w2, b1, _ = casts
        again = ops.direct(ops.pre_activation, x)
        h = again(x, w1, w2, b1, row_slot, slot_row, expert_offsets, *kind, likely)
    return weights, h[:pairs], row_slot, slot_row, expert_offsets


def _cast(parameters: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(None if p is None else p.to(dtype) for p in parameters)


def _taken(casts: Casts | None, parameters: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The parameters as they are computed with."""
    if casts is None:
        return parameters
    made = iter(casts.take())
    return tuple(None if p is None else next(made) for p in parameters)


class _UpHalf(torch.autograd.Function):
    """x -> h, in rows."""

    @staticmethod
    def forward(ctx, x, w1, w2, b1, row_slot, slot_row, expert_offsets, gated, transposed, scale):
        ctx.save_for_backward(x, w1, w2, b1, row_slot, slot_row, expert_offsets)
        ctx.kind, ctx.scale = (gated, transposed), scale
        return ops.up_half(x, w1, w2, b1, row_slot, slot_row, expert_offsets, gated, transposed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):
        need_x, need_w1, _, need_b1, *_ = ctx.needs_input_grad
        needs = [need_x, need_w1, need_b1]
        dx, dw1, db1 = _where_needed(ops.up_half_backward(dh, *ctx.saved_tensors, *ctx.kind, ctx.scale, needs), needs)
        return dx, dw1, None, db1, None, None, None, None, None, None


class _DownHalf(torch.autograd.Function):
    """a, in rows, -> out."""

    @staticmethod
    def forward(ctx, a, w1, w2, b2, weights, row_slot, slot_row, expert_offsets, gated, transposed, scale):
        ctx.save_for_backward(a, w1, w2, b2, weights, row_slot, slot_row, expert_offsets)
        ctx.kind, ctx.scale = (gated, transposed), scale
        return ops.down_half(a, w1, w2, b2, weights, row_slot, slot_row, expert_offsets, gated, transposed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        need_a, _, need_w2, need_b2, need_weights, *_ = ctx.needs_input_grad
        needs = [need_a, need_w2, need_b2, need_weights]
        gradients = ops.down_half_backward(dout, *ctx.saved_tensors, *ctx.kind, ctx.scale, needs)
        da, dw2, db2, dweights = _where_needed(gradients, needs)
        return da, None, dw2, db2, dweights, None, None, None, None, None, None


def experts(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    index: Tensor,
    weights: Tensor,
    act: str,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    gate: Sequence[float] = (),
    gated: bool = True,
    transposed: bool = False,
    num_pairs: int | LaterPairs | None = None,
    weight_grad_scale: float = 1.0,
    casts: Casts | None = None,
    rows_ready: Callable[[Tensor, Tensor], None] | None = None,
    keep_h: bool = True,
) -> Tensor:
    """The fused layer with gradients: x[T,H], index[T,K], weights[T,K] -> [T,H] in x's dtype.

    w1 is [E,2I,H] ([E,I,H] not gated) and w2 [E,H,I], the last two dimensions of both swapped if transposed; b1
    [E, 2I or I] and b2 [E, H] are biases or None. act is one of launch.ACTIVATIONS and `gate` a launch.Gate's numbers;
    without them the first half of w1's rows is the gate, and nothing is clamped. Slots with index outside 0..E-1 are
    sentinels; num_pairs is the number of the others where the host knows it, or will. weight_grad_scale multiplies the
    gradients of w1, w2, b1 and b2, and nothing else. With `casts`, which makes the four (those there, in that order) in
    x's dtype, they may be of another; their gradients come in their own. rows_ready is called in backward with the
    gradients of x and weights (without elements where not needed), before those of the parameters are computed. keep_h:
    whether the pre-activation is kept for backward, or computed again there, to the same bits. Raises ValueError on
    what does not fit together.
    """
    parameters = (w1, w2, b1, b2)
    dtypes = (w1.dtype, w2.dtype) if casts is None else (x.dtype, x.dtype)
    launch.check_inputs(x, dtypes, index, weights, launch.Layer.of(w1, w2, gated, transposed))
    pairs = -1 if num_pairs is None else num_pairs
    kind = (act, list(gate), gated, transposed)
    learns = (t for t in (x, *parameters, weights) if t is not None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in learns):
        return _Experts.apply(x, *parameters, index, weights, kind, pairs, weight_grad_scale, casts, rows_ready, keep_h)
    forward = ops.direct(ops.experts_forward, x)
    out, *_ = forward(x, *_taken(casts, parameters), index, weights, *kind, *_rows_of(pairs, index), 0)
    return out


def experts_in_halves(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    index: Tensor,
    weights: Tensor,
    gate: Callable[[Tensor], Tensor],
    *,
    gated: bool = True,
    transposed: bool = False,
    num_pairs: int | LaterPairs | None = None,
    weight_grad_scale: float = 1.0,
) -> Tensor:
    """As `experts`, for any gate: a function of rows, [P, 2I] (or [P, I] not gated) -> [P, I], each row by itself.

    b1 [E, 2I] and b2 [E, H] are biases or None; their gradients carry weight_grad_scale too.
    """
    launch.check_inputs(x, (w1.dtype, w2.dtype), index, weights, launch.Layer.of(w1, w2, gated, transposed))
    routing = ops.sort_rows(index, w1.shape[0], num_pairs if isinstance(num_pairs, int) else -1)
    h = _UpHalf.apply(x, w1, w2, b1, *routing, gated, transposed, weight_grad_scale)
    return _DownHalf.apply(gate(h), w1, w2, b2, weights, *routing, gated, transposed, weight_grad_scale)
