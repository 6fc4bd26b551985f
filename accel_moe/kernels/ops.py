"""The layer as torch custom ops: opaque to torch.compile, each with a fake kernel, so that no graph breaks.

`experts_forward` and `experts_backward` join the launches of launch.py; `pre_activation` computes again what the
forward did not keep.

They only compute: autograd.py says what is saved and which gradients are asked for. Weights come as the module stores
them: w1 is [E, 2I, H] ([E, I, H] not gated), w2 is [E, H, I], and `transposed` swaps the last two dimensions of both.
The routing travels as three int32 tensors, row_slot [P], slot_row [T*K] and expert_offsets [E+1] (routing.Routing). A
gradient that is not needed comes back with no elements. `scale` multiplies the gradient of every expert parameter and
nothing else.

`factors` are those of low-rank changes (low_rank.Change): up inner, up outer, down inner, down outer, as far as there
are such, and `scales` two numbers. The narrow rows that forward made of them, up [P, R] and down [P, R], are kept.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import launch, launch_passes, low_rank
from .gathered import PAD, Gathered, TileLists
from .glu import Glu
from .launch import Layer, Term, Weight
from .low_rank import Change
from .routing import Routing, sort_and_tile


def _op(name: str, only_bypassed: str = "") -> Callable[[Callable[..., Any]], Any]:
    """Register a function as a custom op. only_bypassed: the last parameter, if only the function itself takes it:
    an op cannot be given such a value."""

    def register(function):
        def traced(*arguments):
            return function(*arguments)

        signature = inspect.signature(function)
        taken = [p for p in signature.parameters.values() if p.name != only_bypassed]
        traced.__signature__ = signature.replace(parameters=taken)  # pyright: ignore[reportFunctionMemberAccess]
        op = torch.library.custom_op(f"accel_moe::{name}", traced, mutates_args=())
        op.function = function
        return op

    return register


def bypass_dispatcher(op: Any, x: Tensor) -> Callable[..., Any]:
    """The op's own function where nobody looks at ops: the way through torch's dispatcher costs the host a tenth of a
    millisecond. The op itself under torch.compile, for fake tensors, and in a dispatch mode."""
    watched = torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0
    return op if watched else op.function


def _num_rows(index: Tensor, num_pairs: int) -> int:
    return index.numel() if num_pairs < 0 else num_pairs


def _like_if(like: Tensor | None, needed: bool) -> Tensor:
    return like.new_empty(like.shape) if needed else like.new_empty(0)


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


# ---- Fused


@_op("experts_forward")
def experts_forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    factors: list[Tensor | None],
    scales: Sequence[float],
    index: Tensor,
    weights: Tensor,
    act: str,
    gate: Sequence[float],
    gated: bool,
    transposed: bool,
    num_pairs: int,
    likely: int,
    h_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x[T,H], index[T,K], weights[T,K] -> out [T,H], h [h_rows, 2I or I], narrow rows up and down, then the routing.

    b1 [E, 2I or I] and b2 [E, H]: biases, or None. gate: glu.Glu.numbers. num_pairs: slots that are not sentinels,
    or -1 when unknown. likely: how many of the P rows are expected to be in use; the GEMMs are tuned for that. h_rows:
    how many rows of the pre-activation to keep for a backward, the first of P.
    """
    kind = Glu.of(act, gated, gate)
    with launch.on_device(x):
        x, weights = launch.row_major(x), weights.contiguous()
        layer = Layer.of(w1, w2, gated, transposed)
        rows = _num_rows(index, num_pairs)
        up_change, down_change = _changes(factors, scales)
        height = launch.likely_height(_up_kernel(layer), layer, likely, x, up_change is not None)
        routing, made = sort_and_tile(index, layer.num_experts, rows, height)
        tiles = TileLists(routing, made)
        up, down = Weight(w1, depth_last=not transposed), Weight(w2, depth_last=not transposed)
        up_term = up_change and up_change.down(x, routing, tiles, gather=True)
        h, a = _up(layer, x, up, b1, routing, tiles, kind, likely, h_rows, term=up_term)
        down_term = down_change and down_change.down(a, routing, tiles)
        run = lambda c: launch.grouped_rows(a, down, _dense(b2), routing, tiles, c, down_term)  # noqa: E731
        y = launch.tuned("down", layer, likely, x, run, down_term)
        out = launch_passes.sum_slots(y, routing, weights, x.shape[0])
        up_narrow, down_narrow = (x.new_empty(0) if term is None else term.rows for term in (up_term, down_term))
    return out, h, up_narrow, down_narrow, routing.row_slot, routing.slot_row, routing.expert_offsets


def _changes(factors: list[Tensor | None], scales: Sequence[float]) -> tuple[Change | None, Change | None]:
    if not factors:
        return None, None
    return Change.of(*factors[:2], scales[0]), Change.of(*factors[2:], scales[1])


@experts_forward.register_fake
def _(x, w1, w2, b1, b2, factors, scales, index, weights, act, gate, gated, transposed, num_pairs, likely, h_rows):
    ranks = [None if f is None else f.shape[1] for f in factors[::2]] or [None, None]
    rows, integers = _num_rows(index, num_pairs), {"dtype": torch.int32, "device": x.device}
    return (
        x.new_empty(x.shape),
        x.new_empty(h_rows, w1.shape[2 if transposed else 1]),
        *(x.new_empty(0) if rank is None else x.new_empty(rows, rank) for rank in ranks),
        torch.empty(rows, **integers),
        torch.empty(index.numel(), **integers),
        torch.empty(w1.shape[0] + 1, **integers),
    )


@_op("pre_activation")
def pre_activation(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    factor: Tensor | None,
    narrow: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    expert_offsets: Tensor,
    act: str,
    gate: Sequence[float],
    gated: bool,
    transposed: bool,
    likely: int,
) -> Tensor:
    """h [P, 2I or I] as experts_forward computed it, for a backward that finds too little of it kept; `likely` is that
    forward's: the same configuration gives the same bits. w2 only tells the layer's shape. factor: up outer, with the
    narrow rows that forward kept."""
    kind = Glu.of(act, gated, gate)
    with launch.on_device(x):
        x = launch.row_major(x)
        layer = Layer.of(w1, w2, gated, transposed)
        routing = Routing(row_slot, slot_row, expert_offsets, top_k=slot_row.numel() // max(1, x.shape[0]))
        tiles, up = TileLists(routing), Weight(w1, depth_last=not transposed)
        term = None if factor is None else Term(narrow, factor.contiguous())
        h, _ = _up(layer, x, up, b1, routing, tiles, kind, likely, routing.num_rows, term=term, activate=False)
    return h


@pre_activation.register_fake
def _(x, w1, w2, b1, factor, narrow, row_slot, slot_row, expert_offsets, act, gate, gated, transposed, likely):
    return x.new_empty(row_slot.shape[0], w1.shape[2 if transposed else 1])


def _up(
    layer: Layer, x, up: Weight, b1, routing: Routing, tiles: TileLists, kind: Glu, likely: int, h_rows: int, **options
) -> tuple[Tensor, Tensor]:
    """launch.up_projection as it is tuned for `likely` rows in use."""
    run = lambda c: launch.up_projection(x, up, _dense(b1), routing, tiles, c, kind, h_rows, **options)  # noqa: E731
    return launch.tuned(_up_kernel(layer), layer, likely, x, run, options.get("term"))


def _up_kernel(layer: Layer) -> str:
    return "up" if layer.gated else "up_plain"


@_op("experts_backward", only_bypassed="on_input_grads")
def experts_backward(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    factors: list[Tensor | None],
    scales: Sequence[float],
    weights: Tensor,
    h: Tensor,
    up_narrow: Tensor,
    down_narrow: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    expert_offsets: Tensor,
    act: str,
    gate: Sequence[float],
    gated: bool,
    transposed: bool,
    scale: float,
    grad_dtype: torch.dtype,
    filled: bool,
    needs: list[bool],
    on_input_grads: Callable[[Tensor, Tensor], None] | None = None,
) -> list[Tensor]:
    """-> gradients of x, w1, w2, b1, b2, weights and the factors, as `needs` asks for them in that order; those of the
    four parameters in grad_dtype. filled: every one of the P rows is in use. on_input_grads: called with the gradients
    of x and weights before the others are computed."""
    need_x, need_w1, need_w2, need_b1, need_b2, need_weights, *need_factors = needs
    kind, biased = Glu.of(act, gated, gate), int(b2 is not None)
    with launch.on_device(x):
        dout, x, weights = launch.row_major(dout), launch.row_major(x), weights.contiguous()
        layer = Layer.of(w1, w2, gated, transposed)
        routing = Routing(row_slot, slot_row, expert_offsets, top_k=weights.shape[1])
        rows = routing.num_rows
        up_change, down_change = _changes(factors, scales)
        of_down = launch.likely_height("down_backward", layer, rows, x, down_change is not None)
        of_up = launch.likely_height("up_backward", layer, rows, x, up_change is not None)
        tiles = TileLists(routing, together=[of_down, of_up, PAD])
        down = Weight(w2, depth_last=transposed)
        dout_rows, up_term = Gathered(dout, routing, tiles), None
        down_term = down_change and down_change.up(dout, routing, tiles, gather=True)
        dh, sa, ds = launch.tuned(
            "down_backward",
            layer,
            rows,
            x,
            lambda c: launch.down_backward(dout_rows, down, h, weights, routing, tiles, c, kind, down_term, biased),
            down_term,
        )
        if b2 is not None:
            launch_passes.dot_bias(dout, b2.contiguous(), ds[-1], routing, tiles)
        tail = PAD if (need_w1 or need_w2) and not filled else 0
        dweights = launch_passes.routing_grad(ds, dh, sa, routing, weights, need_weights, tail)
        if up_change is not None and (need_x or any(need_factors[:2])):
            up_term = up_change.up(dh, routing, tiles)
        dx = None
        if on_input_grads is not None:  # for one more buffer of P rows at the peak
            dx = _input_grad(layer, x, w1, dh, routing, tiles, need_x, up_term)
            on_input_grads(dx, dweights)
        # Each buffer of P rows but the caller's h is dropped once its last reader is launched: they decide the peak.
        dw2 = _weight_grad("down_weight_grad", layer, dout_rows, sa, transposed, routing, scale, need_w2, grad_dtype)
        dfactors = [x.new_empty(0) for _ in factors]
        if down_term is not None and need_factors[2]:
            dfactors[2] = low_rank.grad(down_term.rows, sa, routing)
        if down_term is not None and need_factors[3]:
            dfactors[3] = low_rank.grad(down_narrow, dout, routing, gather=True, weights=weights)
        ds = sa = dout_rows = None
        if up_term is not None and need_factors[0]:
            dfactors[0] = low_rank.grad(up_term.rows, x, routing, gather=True)
        if up_term is not None and need_factors[1]:
            dfactors[1] = low_rank.grad(up_narrow, dh, routing)
        db1 = (
            launch_passes.bias_grad(dh, None, routing, b1, scale, grad_dtype)
            if need_b1 and b1 is not None
            else x.new_empty(0)
        )
        db2 = (
            launch_passes.bias_grad(dout, weights, routing, b2, scale, grad_dtype)
            if need_b2 and b2 is not None
            else x.new_empty(0)
        )
        dw1 = _up_weight_grad(layer, x, dh, routing, tiles, scale, need_w1, grad_dtype)
        if dx is None:
            dx = _input_grad(layer, x, w1, dh, routing, tiles, need_x, up_term)
    return [dx, dw1, dw2, db1, db2, dweights, *dfactors]


@experts_backward.register_fake
def _(dout, x, w1, w2, b1, b2, factors, scales, weights, *rest):
    *_, grad_dtype, _, needs = rest
    gradients = [
        _like_if(x if like is None else like, n and like is not None)
        for like, n in zip((x, w1, w2, b1, b2, weights, *factors), needs, strict=True)
    ]
    return [g.to(grad_dtype) if 0 < i < 5 and g.numel() else g for i, g in enumerate(gradients)]


def _weight_grad(
    kernel, layer: Layer, left, right, swap: bool, routing: Routing, scale: float, needed: bool, dtype: torch.dtype
) -> Tensor:
    """scale * left.T @ right per expert, or its transpose, in dtype; one of the two is Gathered."""
    plain = right if isinstance(left, Gathered) else left
    if not needed:
        return plain.new_empty(0)
    if swap:
        left, right = right, left
    run = lambda c: launch.weight_grad(left, right, routing, c, scale, dtype)  # noqa: E731
    return launch.tuned(kernel, layer, routing.num_rows, plain, run)


def _up_weight_grad(
    layer: Layer, x: Tensor, dh: Tensor, routing: Routing, tiles: TileLists, scale: float, needed: bool, dtype
) -> Tensor:
    """dh.T @ x[token] per expert, as w1 is stored."""
    if not needed:
        return x.new_empty(0)
    x_rows = Gathered(x, routing, tiles)
    return _weight_grad("up_weight_grad", layer, dh, x_rows, layer.transposed, routing, scale, True, dtype)


def _input_grad(
    layer: Layer, x: Tensor, w1: Tensor, dh: Tensor, routing: Routing, tiles: TileLists, needed: bool, term: Term | None
) -> Tensor:
    """sum_k (dh @ w1 + term)[row(t, k)]."""
    if not needed:
        return x.new_empty(0)
    up = Weight(w1, depth_last=layer.transposed)
    run = lambda c: launch.grouped_rows(dh, up, None, routing, tiles, c, term)  # noqa: E731
    dx_rows = launch.tuned("up_backward", layer, routing.num_rows, x, run, term)
    return launch_passes.sum_slots(dx_rows, routing, None, x.shape[0])
