"""What the backward keeps and which gradients it computes: the custom ops of launch.py joined under
torch.autograd.

Saved: x, both weights and top_k_weights (held by others anyway), the pre-activation h [P, 2I], and the
routing as int32.
"""

import torch
from torch import Tensor

from . import launch


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, w2, index, weights, act, num_pairs, weight_grad_scale):
        out, h, *routing = launch.experts_forward(x, w1, w2, index, weights, act, num_pairs, True)
        ctx.save_for_backward(x, w1, w2, weights, h, *routing)
        ctx.act, ctx.weight_grad_scale = act, weight_grad_scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, w1, w2, weights, h, row_slot, slot_row, expert_offsets = ctx.saved_tensors
        need_x, need_w1, need_w2, _, need_weights, *_ = ctx.needs_input_grad
        needs = [need_x, need_w1, need_w2, need_weights]
        dx, dw1, dw2, dweights = launch.experts_backward(
            dout,
            x,
            w1,
            w2,
            weights,
            h,
            row_slot,
            slot_row,
            expert_offsets,
            ctx.act,
            ctx.weight_grad_scale,
            needs,
        )
        return (
            dx if need_x else None,
            dw1 if need_w1 else None,
            dw2 if need_w2 else None,
            None,
            dweights if need_weights else None,
            None,
            None,
            None,
        )


def experts(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    index: Tensor,
    weights: Tensor,
    act: str,
    num_pairs: int | None = None,
    weight_grad_scale: float = 1.0,
) -> Tensor:
    """The experts layer with gradients: x[T,H], w1[E,2I,H], w2[E,H,I], index[T,K], weights[T,K] -> [T,H] in
    x's dtype.

    act is one of launch.ACTIVATIONS. Slots with index >= E are sentinels; num_pairs is the number of the
    others where the host knows it. weight_grad_scale multiplies the gradients of w1 and w2 and nothing else.
    Raises ValueError on what does not fit together.
    """
    launch.check_inputs(x, w1, w2, index, weights)
    pairs = -1 if num_pairs is None else num_pairs
    if torch.is_grad_enabled() and (x.requires_grad or w1.requires_grad or w2.requires_grad or weights.requires_grad):
        return _Experts.apply(x, w1, w2, index, weights, act, pairs, weight_grad_scale)
    out, *_ = launch.experts_forward(x, w1, w2, index, weights, act, pairs, False)
    return out
