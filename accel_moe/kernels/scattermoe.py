"""The forward registered with transformers as experts_implementation="scattermoe": from a module to the
kernels.

`scattermoe_experts_forward(module, hidden_states[T,H], top_k_index[T,K], top_k_weights[T,K]) -> [T,H]` takes
any experts module of transformers v5 (or a view of one) whose maths `unsupported_reason` does not refuse.
Triton is imported at the first call, so this file imports anywhere. It leaves alone: the router, shared
experts, and every collective.
"""

import torch
from torch import Tensor

# What ACT2FN and torch.nn call the activations that gemm.activation computes.
_ACTIVATION_NAMES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
    "GELUActivation": "gelu",
    "gelu": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "relu": "relu",
    "ReLUSquaredActivation": "relu2",
}


def activation_name(act_fn) -> str | None:
    """The kernels' name for a module's act_fn, or None when no kernel computes it."""
    name = getattr(act_fn, "__name__", type(act_fn).__name__)
    if name == "GELU":
        return "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
    if name == "GELUActivation" and "python" in getattr(act_fn.act, "__name__", ""):
        return "gelu"
    return _ACTIVATION_NAMES.get(name)


def unsupported_reason(module) -> str | None:
    """Why scattermoe cannot compute this experts module, in words for an error message; None when it can.

    Reads attributes only: no tensor, no device, no Triton. What it does not know, it refuses.
    """
    name = type(module).__name__
    missing = [a for a in ("has_gate", "has_bias", "is_transposed", "is_concatenated") if not hasattr(module, a)]
    if missing:
        return f"{name} is not an experts module of transformers v5: it has no {', '.join(missing)}"
    if not module.has_gate:
        return f"{name} has no gate (has_gate=False)"
    if module.has_bias:
        return f"{name} has biases (has_bias=True)"
    if module.is_transposed:
        return f"{name} stores its weights transposed (is_transposed=True)"
    if not module.is_concatenated:
        return f"{name} interleaves gate and up columns (is_concatenated=False)"
    if getattr(module, "has_post_expert_norm", False):
        return f"{name} normalises each expert's output (has_post_expert_norm=True)"
    gate = getattr(module, "_apply_gate", None)
    if getattr(gate, "__name__", "_default_apply_gate") != "_default_apply_gate":
        return f"{name} has a gate of its own ({name}._apply_gate)"
    if activation_name(getattr(module, "act_fn", None)) is None:
        act = getattr(module, "act_fn", None)
        return f"{name} uses the activation {act}; known are silu, gelu, gelu_tanh, relu, relu2"
    for weight in ("gate_up_proj", "down_proj"):
        if getattr(getattr(module, weight, None), "ndim", None) != 3:
            return f"{name}.{weight} is not one 3-dimensional tensor"
    return None


def scattermoe_experts_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts layer, [T,H] in hidden_states' dtype, differentiable in hidden_states, both weights and
    top_k_weights.

    self: an experts module, or a view that answers its attributes; a view may also have `weight_grad_scale`
    (multiplies both weight gradients, default 1.0) and `num_pairs` (how many slots are not sentinels, where
    the host knows; buffers are then of that size). A slot with top_k_index >= num_experts is a sentinel: no
    work, no contribution, gradient exactly 0. No host sync, no collective. Raises ValueError for a module
    that unsupported_reason refuses and for tensors that do not fit.
    """
    reason = unsupported_reason(self)
    if reason is not None:
        raise ValueError(
            f"scattermoe does not support this experts layer: {reason}. Choose "
            f"experts_implementation='grouped_mm' (or 'eager')."
        )
    from .autograd import experts  # the first call imports Triton

    w1, w2 = self.gate_up_proj, self.down_proj
    dtype, device = hidden_states.dtype, hidden_states.device.type
    x = hidden_states
    if torch.is_autocast_enabled(device):
        # As F.linear would under autocast; the casts are differentiable, gradients return in the parameters'
        # dtype.
        compute = torch.get_autocast_dtype(device)
        x, w1, w2 = x.to(compute), w1.to(compute), w2.to(compute)
    out = experts(
        x,
        w1,
        w2,
        top_k_index,
        top_k_weights,
        activation_name(self.act_fn),
        getattr(self, "num_pairs", None),
        getattr(self, "weight_grad_scale", 1.0),
    )
    return out.to(dtype)
