"""A sharded layer inside a compiled graph: one op, whose inside runs eagerly.

torch.compile cannot trace an exchange: a host starts it and waits for it, and its sizes come from other ranks. So the
graph sees one op, `accel_moe::sharded_experts`, with a fake that says what comes out. At run time the op calls the
layer's own eager code, and keeps the autograd graph which that leaves. Its backward op runs that graph: gradients of
the rows, the routing weights and the factors of LoRA come back into the compiled graph, those of the experts'
parameters are accumulated in place, as ever. The graph of the decoder layer does not break.

FSDP must have no hooks inside: it ignores the experts where ep spans dp_shard. Elsewhere the compiled graph breaks
around the experts, as FSDP's hooks break it already.

Two tensors stand for what a graph cannot hold. `LayerState.handle` names the layer: a number that is a tensor, so that
one graph serves all decoder layers. It asks for a gradient, so that the op has a backward where its rows need none. The
ticket that forward returns names what was kept; when nobody has the ticket any more, what was kept goes.

After torch's `leaf_function` (torch 2.13, torch/_higher_order_ops/invoke_leaf_function.py), which keeps one forward at
a time, and the handles of torchtitan's DeepEP ops.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accel_moe.dispatch.base import RoutedTokens
from accel_moe.kernels.hints import LowRank

_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_forwards: dict[int, tuple[Tensor, list[Tensor | None]]] = {}
"""By ticket: what a forward gave, with its autograd graph, and the list that its entry's gradients come into."""
_numbers, _tickets = itertools.count(1), itertools.count(1)


def handle_of(module: Any) -> Tensor:
    """The tensor that stands for a layer in graphs: a number, exact in float64."""
    number = next(_numbers)
    _layers[number] = module
    return torch.tensor(float(number), dtype=torch.float64, requires_grad=True)


def sharded(module: Any, tokens: RoutedTokens) -> Tensor:
    """The layer's forward, [T, H], where torch.compile traces it. A collective over the ep group when it runs."""
    layer = module._accel_moe_layer
    changes, factors = [], []
    for name, lent in layer.deltas.items():
        for one in lent:
            changes.append(f"{name}*{float(one.scale)}")
            factors += [one.inner, one.outer]
    learns = torch.is_grad_enabled()
    out, _ = torch.ops.accel_moe.sharded_experts(*tokens, layer.handle, factors, ",".join(changes), learns)
    return out


@torch.library.custom_op("accel_moe::sharded_experts", mutates_args=())
def _forward(
    rows: Tensor,
    index: Tensor,
    weights: Tensor,
    handle: Tensor,
    factors: Sequence[Tensor],
    changes: str,
    learns: bool,
) -> tuple[Tensor, Tensor]:
    module = _layers[int(handle)]
    # copies: the compiled graph may give the memory of its own tensors to others before the backward
    entering = rows.clone(), weights.clone(), *(factor.clone() for factor in factors)
    gradients: list[Tensor | None] = []
    with _autograd(), torch.set_grad_enabled(learns):
        rows, weights, *factors = _Entry.apply(gradients, handle.detach().requires_grad_(learns), *entering)
    del entering  # the graph keeps what its backward needs
    tokens = RoutedTokens(rows, index.clone(), weights)
    deltas = module._accel_moe_layer.deltas
    before = dict(deltas)
    deltas.clear()
    for at, change in enumerate(changes.split(",") if changes else ()):
        name, scale = change.split("*")
        deltas.setdefault(name, []).append(LowRank(factors[2 * at], factors[2 * at + 1], float(scale)))
    try:
        with _autograd(), torch.set_grad_enabled(learns):
            out = module.exchange_and_compute(tokens)
    finally:
        deltas.clear()
        deltas.update(before)
    ticket = torch.tensor(next(_tickets))
    if out.requires_grad:
        _forwards[int(ticket)] = out, gradients
        weakref.finalize(ticket, _forwards.pop, int(ticket), None)
    return out.detach(), ticket


@_forward.register_fake
def _(rows, index, weights, handle, factors, changes, learns):
    return torch.empty_like(rows, memory_format=torch.contiguous_format), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("accel_moe::sharded_experts_backward", mutates_args=())
def _backward(grad: Tensor, ticket: Tensor, weights: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    kept = _forwards.get(int(ticket)) if keep else _forwards.pop(int(ticket), None)
    if kept is None:
        raise RuntimeError(
            "A compiled layer's backward ran a second time, and its forward is no longer kept. Call "
            "backward(retain_graph=True) the first time, or compute the second gradient from a forward of its own."
        )
    out, gradients = kept
    with _autograd(), torch.enable_grad():
        torch.autograd.backward(out, grad, retain_graph=keep)
    like = grad, weights, *factors
    given = [torch.zeros_like(t) if g is None else g for t, g in zip(like, gradients or [None] * len(like))]
    gradients.clear()
    return [*(gradient.contiguous() for gradient in given), torch.zeros((), dtype=torch.float64)]


@_backward.register_fake
def _(grad, ticket, weights, factors):
    like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (grad, weights, *factors)]
    return [*like, torch.empty((), dtype=torch.float64)]


def _remember(ctx, inputs, output) -> None:
    _, _, weights, _, factors, *_ = inputs
    ctx.save_for_backward(output[1], weights, *factors)


def _gradients(ctx, grad, _):
    ticket, weights, *factors = ctx.saved_tensors
    rows, to_weights, *to_factors, to_handle = torch.ops.accel_moe.sharded_experts_backward(
        grad.contiguous(), ticket, weights, factors
    )
    return rows, None, to_weights, to_handle, to_factors, None, None


torch.library.register_autograd("accel_moe::sharded_experts", _gradients, setup_context=_remember)


class _Entry(torch.autograd.Function):
    """Where a layer's own graph begins. It is the identity; in backward the gradients come into a list. Leaves would
    keep their values alive until then, which nobody needs."""

    @staticmethod
    def forward(ctx, gradients: list[Tensor | None], handle: Tensor, *tensors: Tensor):
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        ctx.gradients[:] = gradients
        return None, None, *(None for _ in gradients)


def _autograd() -> Any:
    """Within it, operations are recorded again: an op's own code runs below autograd."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)
