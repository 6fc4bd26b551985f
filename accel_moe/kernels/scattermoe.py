"""The forward registered with transformers as experts_implementation="scattermoe": from a module to the
kernels.

`scattermoe_experts_forward(module, hidden_states[T,H], top_k_index[T,K], top_k_weights[T,K]) -> [T,H]` takes
any experts module of transformers v5 (or a view of one) whose maths `unsupported_reason` does not refuse.
Triton is imported at the first call, so this file imports anywhere. It leaves alone: the router, shared
experts, and every collective.
"""

import torch
from torch import Tensor

from .glu import gate_of, has_default_gate


def unsupported_reason(module) -> str | None:
    """Why scattermoe cannot compute this experts module, in words for an error message; None when it can.

    Reads attributes only: no tensor, no device, no Triton. What it does not know, it refuses.
    """
    name = type(module).__name__
    missing = [a for a in ("has_gate", "has_bias", "is_transposed", "is_concatenated") if not hasattr(module, a)]
    if missing:
        return f"{name} is not an experts module of transformers v5: it has no {', '.join(missing)}"
    if getattr(module, "has_post_expert_norm", False):
        return f"{name} normalises each expert's output (has_post_expert_norm=True)"
    up = "gate_up_proj" if module.has_gate else "up_proj"
    for weight, dims in ((up, 3), ("down_proj", 3), (f"{up}_bias", 2), ("down_proj_bias", 2)):
        if dims == 2 and not module.has_bias:
            continue
        if getattr(getattr(module, weight, None), "ndim", None) != dims:
            return f"{name}.{weight} is not one {dims}-dimensional tensor"
    if module.has_gate and not module.is_concatenated and has_default_gate(module):
        return f"{name} interleaves gate and up columns (is_concatenated=False) and has no _apply_gate that says how"
    return None


def parameter_names(module) -> list[str]:
    """What an experts module computes with: up-projection, down-projection, and their biases if it has any."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return [up, "down_proj"] + ([f"{up}_bias", "down_proj_bias"] if module.has_bias else [])


def scattermoe_experts_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts layer, [T,H] in hidden_states' dtype, differentiable in hidden_states, parameters and
    top_k_weights.

    self: an experts module, or a view that answers its attributes. A view may also have `weight_grad_scale`
    (multiplies the gradient of every expert parameter, default 1.0); `num_pairs` (how many slots are not sentinels,
    where the host knows: buffers are then of that size; or counts.LaterPairs, where it will); `casts` (casts.Casts of
    the parameters, where they are not in hidden_states' dtype; their gradients come in their own); `known_gate`
    (gate_of it, where somebody asked that, and unsupported_reason, before); `rows_ready` (called in backward as
    soon as the gradients of hidden_states and top_k_weights are there); and `keep_h` (False: with a gate known to the
    kernels, the up-projection is computed again in backward, instead of being kept). A slot with top_k_index outside
    0..num_experts-1 is a sentinel: no work, no contribution, gradient exactly 0. No host sync, no collective. Raises
    ValueError for a module that unsupported_reason refuses and for tensors that do not fit.
    """
    known = getattr(self, "known_gate", None)
    reason = None if known is not None else unsupported_reason(self)
    if reason is not None:
        raise ValueError(
            f"scattermoe does not support this experts layer: {reason}. Choose "
            f"experts_implementation='grouped_mm' (or 'eager')."
        )
    from .autograd import experts, experts_in_halves  # the first call imports Triton

    x, names = hidden_states, parameter_names(self)
    parameters, casts = [getattr(self, name) for name in names], getattr(self, "casts", None)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # as F.linear would; differentiable
        if casts is None:
            parameters = [p.to(x.dtype) for p in parameters]
    options = {
        "gated": self.has_gate,
        "transposed": self.is_transposed,
        "num_pairs": getattr(self, "num_pairs", None),
        "weight_grad_scale": getattr(self, "weight_grad_scale", 1.0),
    }
    w1, w2, b1, b2 = *parameters, *[None] * (4 - len(names))
    gate = known or gate_of(self)
    if gate is not None:
        numbers = gate.numbers
        out = experts(
            x,
            w1,
            w2,
            top_k_index,
            top_k_weights,
            gate.act,
            b1=b1,
            b2=b2,
            gate=numbers,
            casts=casts,
            rows_ready=getattr(self, "rows_ready", None),
            keep_h=getattr(self, "keep_h", True),
            **options,
        )
    else:
        apply_gate = self._apply_gate if self.has_gate else self.act_fn
        out = experts_in_halves(x, w1, w2, b1, b2, top_k_index, top_k_weights, apply_gate, **options)
    return out.to(hidden_states.dtype)
